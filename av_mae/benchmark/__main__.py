"""`python -m av_mae.benchmark`: timings, FLOPs and memory, measured as ratios within one run, or predicted for TPUs.

`scaling` prints the tables of docs/scaling.md from what `pod --json=FILE` wrote.
"""

import argparse
import dataclasses
import json
import os
import pathlib
from typing import Any

from av_mae import benchmark, recipes
from av_mae.config import SIZES
from av_mae.errors import UserError, run_command

EXAMPLE = """example:
  python -m av_mae.benchmark step --config=configs/pretrain.py:base --config.batch_size=8 \\
      --config.dtype=float32 --plain --json=step.json
  python -m av_mae.benchmark fusion --plot=fusion.png
  python -m av_mae.benchmark input --data=DIR --device_rate=600 --workers=8
  python -m av_mae.benchmark pod --topology=v5e:16x16 --config=configs/pretrain.py:large \\
      --config.batch_size=8192 --json=large.json
  python -m av_mae.benchmark loop --config=configs/demo.py --config.checkpoint_every=100
"""


def run_step(arguments: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    from av_mae.benchmark import step

    config = recipes.load_recipe(arguments.config, overrides)
    if arguments.encoder:
        metrics = step.measure_encoder(config, arguments.rounds)
    else:
        metrics = step.measure(config, arguments.rounds, arguments.plain)
    print(benchmark.table(benchmark.metric_rows({"config": arguments.config} | metrics)))
    return {"config": arguments.config} | metrics


def run_fusion(arguments: argparse.Namespace, _: list[str]) -> dict[str, Any]:
    from av_mae.benchmark import parts

    rows = parts.measure_fusion(arguments.batch, arguments.rounds, SIZES[arguments.size])
    head = ("kind", "pairs", "image", "audio", "ms", "MFLOP per clip", "temporary MB")
    cells = [
        (
            row["kind"],
            row["pair_attention"],
            str(row["image_tokens"]),
            str(row["audio_tokens"]),
            f"{1e3 * row['seconds']:.2f}",
            f"{row['flops_per_clip'] / 1e6:.1f}",
            f"{row['memory_bytes'] / 1e6:.1f}",
        )
        for row in rows
    ]
    print(benchmark.table([head, *cells]))
    if arguments.plot:
        parts.plot_fusion(rows, arguments.plot)
    return {"rows": rows}


def run_input(arguments: argparse.Namespace, _: list[str]) -> dict[str, Any]:
    from av_mae.benchmark import input as reading

    for option in ("clips", "device_rate", "workers"):
        if getattr(arguments, option) < (option == "clips"):
            raise UserError(f"--{option}={getattr(arguments, option)} must be {int(option == 'clips')} or more")
    metrics = reading.measure(
        arguments.data, arguments.clips, arguments.rounds, arguments.device_rate, arguments.workers
    )
    for rows in reading.tables(metrics):
        print(benchmark.table(rows) + "\n")
    print(f"{metrics['times_video']:.1f} × as many clips per core as from their mp4 files")
    if arguments.device_rate:
        print(
            f"\nat {arguments.device_rate:g} clips/s a step waits for {arguments.workers} workers "
            f"{100 * metrics['input_wait_share']:.1f} % of its time; "
            f"{metrics['cores_for_device_rate']:.1f} cores serve that rate"
        )
    return metrics


def run_pod(arguments: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    from av_mae.benchmark import pod, roofline

    config = recipes.load_recipe(arguments.config, overrides)
    metrics = {"config": arguments.config} | pod.measure(config, arguments.topology, arguments.slices)
    if "refusal" in metrics:
        return metrics
    if arguments.clips:
        metrics |= pod.recipe_hours(metrics, config, arguments.clips)
    for rows in pod.tables(metrics):
        print(benchmark.table(rows) + "\n")
    metrics["curve"] = roofline.curve(metrics)
    if arguments.plot:
        roofline.plot({arguments.topology.split(":")[0]: {arguments.config: metrics["curve"]}}, arguments.plot)
    return metrics


def run_loop(arguments: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    from av_mae.benchmark import parts
    from av_mae.console import quiet_libraries

    if not 1 <= arguments.block <= arguments.steps:
        raise UserError(f"--block={arguments.block} must be from 1 to --steps={arguments.steps}")
    config = recipes.load_recipe(arguments.config, overrides)
    quiet_libraries()
    config = dataclasses.replace(config, steps=arguments.steps, epochs=0.0, images_every=0)
    metrics = {"config": arguments.config} | parts.measure_loop(config, arguments.steps, arguments.block)
    print(benchmark.table(benchmark.metric_rows(metrics)))
    return metrics


def run_neighbours(arguments: argparse.Namespace, _: list[str]) -> dict[str, Any]:
    from av_mae.benchmark import parts

    if not 2 <= arguments.part <= arguments.clips or min(arguments.width, arguments.block) < 1:
        raise UserError(
            f"--part={arguments.part} must be at least 2, at most --clips={arguments.clips}, --width and "
            "--block at least 1"
        )
    metrics = parts.measure_neighbours(arguments.clips, arguments.width, arguments.part, arguments.block)
    print(benchmark.table(benchmark.metric_rows(metrics)))
    return metrics


def run_scaling(arguments: argparse.Namespace, _: list[str]) -> dict[str, Any]:
    from av_mae.benchmark import roofline

    tables = roofline.scaling(arguments.files, arguments.share, arguments.plot)
    print("\n\n".join(map(benchmark.table, tables)))
    return {"tables": tables}


RUNS = {
    "step": (run_step, "a training step of a recipe on random clips"),
    "fusion": (run_fusion, "fusion kinds × implementations over token counts"),
    "input": (run_input, "clips per second and core, by stage, beside the same clips as mp4"),
    "pod": (run_pod, "a training step of a recipe, compiled for TPUs that need not be there"),
    "loop": (run_loop, "what the training loop costs beside its steps"),
    "neighbours": (run_neighbours, "nearest neighbours among random embeddings, beside scikit-learn's"),
    "scaling": (run_scaling, "predicted efficiency over chips, from what `pod` wrote or from an assumed share"),
}


def _number(parser: argparse.ArgumentParser, option: str, default: int | None, text: str) -> None:
    parser.add_argument(option, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")


def make_parser() -> argparse.ArgumentParser:
    """The options of all subcommands."""
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.benchmark",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    step, fusion, reading, pod, loop, neighbours, scaling = parsers = [
        commands.add_parser(name, help=text, description=text) for name, (_, text) in RUNS.items()
    ]
    for command in (step, pod, loop):
        recipes.add_config_argument(command)
    step.add_argument("--plain", action="store_true", help="also run the plain formulation, in turn")
    step.add_argument(
        "--encoder",
        action="store_true",
        help="instead: the encoder's forward pass over all patches, beside that of materialized pairs",
    )
    fusion.add_argument("--size", default="base", choices=sorted(SIZES), help="width and heads (default: base)")
    _number(fusion, "--batch", 8, "clips")
    fusion.add_argument("--plot", metavar="FILE", help="write a PNG of time and memory over tokens")
    reading.add_argument("--data", default="", metavar="DIR", help="a prepared set (default: one is made)")
    _number(reading, "--clips", 64, "clips at most")
    reading.add_argument(
        "--device_rate",
        type=float,
        default=0.0,
        metavar="RATE",
        help="clips/s that the accelerators of a host take: also measure how long they wait",
    )
    _number(reading, "--workers", os.cpu_count(), "processes that serve --device_rate")
    pod.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="e.g. v5e:16x16, v5p:4x4x4 or v6e:16x16")
    _number(pod, "--slices", 1, "as many slices of this shape")
    _number(pod, "--clips", 0, "clips per epoch: predicts hours of the recipe")
    _number(loop, "--steps", 200, "steps of the run")
    _number(loop, "--block", 10, "steps of the run, then bare ones, in turn")
    _number(neighbours, "--clips", 200_000, "embeddings")
    _number(neighbours, "--width", 768, "values of each")
    _number(neighbours, "--part", 4096, "clips that scikit-learn searches for")
    _number(neighbours, "--block", 4096, "rows compared at a time")
    scaling.add_argument("files", nargs="*", metavar="FILE", help="what `benchmark pod --json=FILE` wrote")
    scaling.add_argument(
        "--share",
        type=float,
        default=0.0,
        metavar="S",
        help="also steps that were not compiled, at this share of the peak, e.g. 0.4",
    )
    for command in (pod, scaling):
        command.add_argument("--plot", metavar="FILE", help="write a PNG of predicted efficiency over chips")
    for command, rounds in ((step, 5), (fusion, 9), (reading, 5)):
        _number(command, "--rounds", rounds, "timed rounds")
    for command in parsers:
        command.add_argument("--json", metavar="FILE", help="write the metrics to this file")
    return parser


def main(argv: list[str]) -> None:
    arguments, overrides = recipes.parse_arguments(make_parser(), argv)
    if overrides and not hasattr(arguments, "config"):
        raise UserError(f"benchmark {arguments.command} takes no {overrides[0]}: it reads no recipe")
    if getattr(arguments, "rounds", 1) < 1:
        raise UserError(f"--rounds={arguments.rounds} must be at least 1")
    metrics = RUNS[arguments.command][0](arguments, overrides)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(metrics, indent=2) + "\n")
    if "refusal" in metrics:
        raise UserError(metrics["refusal"])


if __name__ == "__main__":
    run_command(main)
