"""`python -m av_mae.benchmark step|fusion|input|pod`: timings, FLOPs and memory, measured as ratios within one run, or
predicted for a TPU slice that is not there."""

import argparse
import functools
import json
import os
import pathlib

from av_mae import recipes
from av_mae.config import SIZES
from av_mae.errors import UserError, run_command

EXAMPLE = """example:
  python -m av_mae.benchmark step --config=configs/pretrain.py:base --config.batch_size=8 \\
      --config.dtype=float32 --plain --json=step.json
  python -m av_mae.benchmark fusion --plot=fusion.png
  python -m av_mae.benchmark input --data=DIR --device_rate=600 --workers=8
  python -m av_mae.benchmark pod --topology=v5e:16x16 --config=configs/pretrain.py:large \\
      --config.batch_size=8192 --json=large.json
"""


def human(figures: dict) -> list[tuple[str, str]]:
    """Figures as rows of text with units."""
    units = {
        "seconds": ("{:.3f} s", 1),
        "bytes": ("{:.2f} GB", 1e-9),
        "clip": ("{:.2f} GFLOP", 1e-9),
        "flops_per_second": ("{:.1f} GFLOP/s", 1e-9),
        "share": ("{:.3f}", 1),
        "mfu": ("{:.3f}", 1),
    }
    rows = [("figure", "value")]
    for name, value in figures.items():
        matches = [units[end] for end in sorted(units, key=len, reverse=True) if name.endswith(end)]
        if isinstance(value, str | int) and not matches:
            rows.append((name, str(value)))
            continue
        form, factor = matches[0] if matches and name != "clips_per_second" else ("{:.2f}", 1)
        rows.append((name, form.format(value * factor)))
    return rows


def run_step(arguments: argparse.Namespace, overrides: list[str]) -> dict:
    from av_mae.benchmark import step, timing

    config = recipes.load_recipe(arguments.config, overrides)
    measure = step.measure_encoder if arguments.encoder else functools.partial(step.measure, with_plain=arguments.plain)
    figures = {"config": arguments.config} | measure(config, arguments.rounds)
    print(timing.table(human(figures)))
    return figures


def run_fusion(arguments: argparse.Namespace, overrides: list[str]) -> dict:
    from av_mae.benchmark import fusion, timing

    if overrides:
        raise UserError(f"benchmark fusion takes no {overrides[0]}: set --size and --batch")
    rows = fusion.measure(arguments.batch, arguments.rounds, SIZES[arguments.size])
    head = ("kind", "pairs", "image", "audio", "ms", "MFLOP per clip", "temporary MB")
    print(
        timing.table(
            [head]
            + [
                (
                    r["kind"],
                    r["pair_attention"],
                    str(r["image_tokens"]),
                    str(r["audio_tokens"]),
                    f"{1e3 * r['seconds']:.2f}",
                    f"{r['flops_per_clip'] / 1e6:.1f}",
                    f"{r['memory_bytes'] / 1e6:.1f}",
                )
                for r in rows
            ]
        )
    )
    if arguments.plot:
        fusion.plot(rows, arguments.plot)
    return {"rows": rows}


def run_input(arguments: argparse.Namespace, overrides: list[str]) -> dict:
    from av_mae.benchmark import input as reading
    from av_mae.benchmark import timing

    if overrides:
        raise UserError(f"benchmark input takes no {overrides[0]}: set --data and --clips")
    for option in ("clips", "device_rate", "workers"):
        if getattr(arguments, option) < (option == "clips"):
            raise UserError(f"--{option}={getattr(arguments, option)} must be {int(option == 'clips')} or more")
    figures = reading.measure(
        arguments.data, arguments.clips, arguments.rounds, arguments.device_rate, arguments.workers
    )
    rows = [
        (name, f"{1e3 * seconds:.3f}", f"{1 / seconds:.0f}" if seconds > 0 else "")
        for name, seconds in figures["seconds_per_clip"].items()
    ]
    print(timing.table([("stage", "ms per clip", "clips/s per core"), *rows]))
    print(f"\n{figures['times_video']:.1f} × as many clips per core as from their mp4 files\n")
    print(
        timing.table(
            [("one accelerator, ViT-B", "clips/s", "cores")]
            + [
                (name, f"{chip['clips_per_second']:.0f}", f"{chip['cores']:.1f}")
                for name, chip in figures["chips"].items()
            ]
        )
    )
    if arguments.device_rate:
        print(
            f"\nat {arguments.device_rate:g} clips/s a step waits for {arguments.workers} workers "
            f"{100 * figures['input_wait_share']:.1f} % of its time; "
            f"{figures['cores_for_device_rate']:.1f} cores serve that rate"
        )
    return figures


def run_pod(arguments: argparse.Namespace, overrides: list[str]) -> dict:
    from av_mae.benchmark import pod, roofline, timing

    config = recipes.load_recipe(arguments.config, overrides)
    figures = {"config": arguments.config} | pod.measure(config, arguments.topology, arguments.slices)
    if "refusal" in figures:
        return figures
    if arguments.clips:
        figures |= pod.recipe_hours(figures, config, arguments.clips)
    for rows in pod.tables(figures):
        print(timing.table(rows) + "\n")
    figures["curve"] = pod.curve(figures, arguments.topology)
    if arguments.plot:
        roofline.plot({arguments.topology.split(":")[0]: {arguments.config: figures["curve"]}}, arguments.plot)
    return figures


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.benchmark",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="a training step of a recipe on random clips")
    recipes.add_config_argument(step)
    step.add_argument("--plain", action="store_true", help="also run the plain formulation, in turn")
    step.add_argument(
        "--encoder",
        action="store_true",
        help="instead: the encoder's forward pass over all patches, beside that of materialized pairs",
    )
    fusion = commands.add_parser("fusion", help="fusion kinds × implementations over token counts")
    fusion.add_argument("--size", default="base", choices=sorted(SIZES), help="width and heads (default: base)")
    fusion.add_argument("--batch", type=int, default=8, help="clips (default: 8)")
    fusion.add_argument("--plot", metavar="FILE", help="write a PNG of time and memory over tokens")
    pod = commands.add_parser("pod", help="a training step of a recipe, compiled for TPUs that need not be there")
    recipes.add_config_argument(pod)
    pod.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="e.g. v5e:16x16, v5p:4x4x4 or v6e:16x16")
    pod.add_argument("--slices", type=int, default=1, metavar="N", help="as many slices of this shape (default: 1)")
    pod.add_argument("--clips", type=int, default=0, metavar="N", help="clips per epoch: predicts hours of the recipe")
    pod.add_argument("--plot", metavar="FILE", help="write a PNG of predicted efficiency over chips")
    reading = commands.add_parser("input", help="clips per second and core, by stage, beside the same clips as mp4")
    reading.add_argument("--data", default="", metavar="DIR", help="a prepared set (default: one is made)")
    reading.add_argument("--clips", type=int, default=64, help="clips at most (default: 64)")
    reading.add_argument(
        "--device_rate",
        type=float,
        default=0.0,
        help="clips/s that the accelerators of a host take: also measure how long they wait",
    )
    reading.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes that serve --device_rate (default: %(default)s)"
    )
    for command, rounds in ((step, 5), (fusion, 9), (reading, 5)):
        command.add_argument("--rounds", type=int, default=rounds, help=f"timed rounds (default: {rounds})")
    for command in (step, fusion, reading, pod):
        command.add_argument("--json", metavar="FILE", help="write the figures to this file")
    arguments, overrides = recipes.parse_arguments(parser, argv)
    if getattr(arguments, "rounds", 1) < 1:
        raise UserError(f"--rounds={arguments.rounds} must be at least 1")
    run = {"step": run_step, "fusion": run_fusion, "input": run_input, "pod": run_pod}[arguments.command]
    figures = run(arguments, overrides)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")
    if "refusal" in figures:
        raise UserError(figures["refusal"])


if __name__ == "__main__":
    run_command(main)
