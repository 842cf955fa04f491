"""`python -m av_mae.benchmark`: timings, FLOPs and memory, measured as ratios within one run, or predicted for TPUs.

`scaling` prints the tables of docs/scaling.md from what `pod --json=FILE` wrote.
"""

import argparse
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from av_mae import benchmark, recipes
from av_mae.benchmark import input as reading
from av_mae.benchmark import parts, pod, roofline, step
from av_mae.config import SIZES, TrainConfig
from av_mae.console import quiet_libraries
from av_mae.errors import UserError, check_numbers, run_command

EXAMPLE = """example:
  python -m av_mae.benchmark step --config=configs/pretrain.py:base --config.batch_size=8 \\
      --config.dtype=float32 --plain --json=step.json
  python -m av_mae.benchmark fusion --plot=fusion.png
  python -m av_mae.benchmark input --data=DIR --device_rate=600 --workers=8
  python -m av_mae.benchmark pod --topology=v5e:16x16 --config=configs/pretrain.py:large \\
      --config.batch_size=8192 --json=large.json
  python -m av_mae.benchmark loop --config=configs/demo.py --config.checkpoint_every=100
"""
Metrics = dict[str, Any]


def run_fusion(arguments: argparse.Namespace, _: None) -> Metrics:
    rows = parts.measure_fusion(arguments.batch, arguments.rounds, SIZES["base"])
    if arguments.plot:
        parts.plot_fusion(rows, arguments.plot)
    return {"rows": rows}


def run_pod(arguments: argparse.Namespace, config: TrainConfig) -> Metrics:
    metrics = pod.measure(config, arguments.topology, arguments.slices)
    if "refusal" in metrics:
        return metrics
    if arguments.clips:
        metrics |= pod.recipe_hours(metrics, config, arguments.clips)
    if arguments.plot:
        roofline.plot([{"config": arguments.config} | metrics], arguments.plot)
    return metrics | {"curve": roofline.curve(metrics)}


def run_loop(arguments: argparse.Namespace, config: TrainConfig) -> Metrics:
    if not 1 <= arguments.block <= arguments.steps:
        raise UserError(f"--block={arguments.block} must be from 1 to --steps={arguments.steps}")
    quiet_libraries()
    config = dataclasses.replace(config, steps=arguments.steps, epochs=0.0, images_every=0, validate_every=0)
    return parts.measure_loop(config, arguments.steps, arguments.block)


def run_neighbours(arguments: argparse.Namespace, _: None) -> Metrics:
    if not 2 <= arguments.part <= arguments.clips:
        raise UserError(f"--part={arguments.part} must be at least 2, at most --clips={arguments.clips}")
    return parts.measure_neighbours(arguments.clips, arguments.width, arguments.part, arguments.block)


class Command(NamedTuple):
    """A subcommand: what it runs and says of itself, and its options.

    `options`: name → default, smallest value, help. A default of `False` makes a switch, `None` a text without default.
    `tables`: what is printed of the metrics. `config`: whether a recipe is read.
    """

    run: Callable[[argparse.Namespace, Any], Metrics]
    text: str
    options: dict[str, tuple[Any, int, str]]
    tables: Callable[[Metrics], list[benchmark.Table]] = lambda metrics: [benchmark.metric_rows(metrics)]
    config: bool = False


PLOT = {"plot": (None, 0, "write a PNG of predicted efficiency over chips")}
COMMANDS = {
    "step": Command(
        lambda options, config: (
            step.measure_encoder(config, options.rounds)
            if options.encoder
            else step.measure(config, options.rounds, options.plain)
        ),
        "a training step of a recipe on random clips",
        {
            "plain": (False, 0, "also run the plain formulation, in turn"),
            "encoder": (False, 0, "instead: the encoder's forward pass over all patches, beside materialized pairs"),
            "rounds": (5, 1, "timed rounds"),
        },
        config=True,
    ),
    "fusion": Command(
        run_fusion,
        "fusion kinds × implementations over token counts, ViT-B",
        {
            "batch": (8, 1, "clips"),
            "plot": (None, 0, "write a PNG of time and memory over tokens"),
            "rounds": (9, 1, "timed rounds"),
        },
        parts.fusion_tables,
    ),
    "input": Command(
        lambda options, _: reading.measure(
            options.data, options.clips, options.rounds, options.device_rate, options.workers
        ),
        "clips per second and core, by stage, beside the same clips as mp4",
        {
            "data": ("", 0, "a prepared set, otherwise one is made"),
            "clips": (64, 1, "clips at most"),
            "device_rate": (0.0, 0, "clips/s that a host's accelerators take: also measure how long they wait"),
            "workers": (os.cpu_count(), 0, "processes that serve --device_rate"),
            "rounds": (5, 1, "timed rounds"),
        },
        reading.tables,
    ),
    "pod": Command(
        run_pod,
        "a training step of a recipe, compiled for TPUs that need not be there",
        {
            "topology": ("", 0, "CHIP:SHAPE, e.g. v5e:16x16, v5p:4x4x4 or v6e:16x16"),
            "slices": (1, 0, "as many slices of this shape"),
            "clips": (0, 0, "clips per epoch: predicts hours of the recipe"),
        }
        | PLOT,
        pod.tables,
        config=True,
    ),
    "loop": Command(
        run_loop,
        "what the training loop costs beside its steps",
        {"steps": (200, 0, "steps of the run"), "block": (10, 0, "steps of the run, then bare ones, in turn")},
        config=True,
    ),
    "neighbours": Command(
        run_neighbours,
        "nearest neighbours among random embeddings, beside scikit-learn's",
        {
            "clips": (200_000, 2, "embeddings"),
            "width": (768, 1, "values of each"),
            "part": (4096, 0, "clips that scikit-learn searches for"),
            "block": (4096, 1, "rows compared at a time"),
        },
    ),
    "scaling": Command(
        lambda options, _: {"tables": roofline.scaling(options.files, options.share, options.plot)},
        "predicted efficiency over chips, from what `pod` wrote or from an assumed share",
        {"share": (0.0, 0, "also steps that were not compiled, at this share of the peak, e.g. 0.4")} | PLOT,
        lambda metrics: metrics["tables"],
    ),
}


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of a subcommand and the overrides of its recipe.

    Raises:
      UserError: a number is too small, or a recipe is overridden that is not read.
    """
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.benchmark",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        one = commands.add_parser(name, help=command.text, description=command.text)
        if command.config:
            recipes.add_config_argument(one)
        if name == "scaling":
            one.add_argument("files", nargs="*", metavar="FILE", help="what `benchmark pod --json=FILE` wrote")
        for option, (default, _, text) in command.options.items():
            if default is False:
                one.add_argument(f"--{option}", action="store_true", help=text)
            else:
                kind, shown = (
                    str if default is None else type(default),
                    f"{text} (default: {default})" if default else text,
                )
                one.add_argument(f"--{option}", type=kind, default=default, metavar=option.upper(), help=shown)
        one.add_argument("--json", metavar="FILE", help="write the metrics to this file")
    arguments, overrides = recipes.parse_arguments(parser, argv)
    command = COMMANDS[arguments.command]
    if overrides and not command.config:
        raise UserError(f"benchmark {arguments.command} takes no {overrides[0]}: it reads no recipe")
    least = {
        name: smallest for name, (default, smallest, _) in command.options.items() if type(default) in (int, float)
    }
    check_numbers(arguments, least, {"workers": 4096, "batch": 2**20})
    return arguments, overrides


def main(argv: list[str]) -> None:
    arguments, overrides = parse(argv)
    command = COMMANDS[arguments.command]
    config = recipes.load_recipe(arguments.config, overrides) if command.config else None
    metrics = ({"config": arguments.config} if config else {}) | command.run(arguments, config)
    if "refusal" not in metrics:
        print("\n\n".join(map(benchmark.table, command.tables(metrics))))
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(metrics, indent=2) + "\n")
    if "refusal" in metrics:
        raise UserError(metrics["refusal"])


if __name__ == "__main__":
    run_command(main)
