"""`python -m av_mae.benchmark.scaling [FILE...]`: the tables and the curve of docs/scaling.md.

From what `benchmark pod --json=FILE` wrote: a row of each compiled step, and rows derived from it for other numbers of
the same chips. The step without exchanges takes as long at the same clips per chip (and in proportion to them where a
recipe's batch is kept); the exchanges are those of data and fully sharded parallelism by the roofline. With --share,
the same rows for base, large and huge without a compilation: the step without exchanges is taken to run at that share
of the chip's peak.
"""

import argparse
import dataclasses
import functools
import json
import pathlib

from av_mae.benchmark import pod, roofline, timing
from av_mae.config import sized_model
from av_mae.errors import UserError, run_command
from av_mae.models import AVMAEConfig, closed_form_flops
from av_mae.recipes import load_recipe
from av_mae.train.sharding import BYTES_PER_PARAMETER, STATE_SHARE
from av_mae.train.step import PASSES, Pretraining, count_parameters

CLIPS, CHIPS_EACH = 32, 16  # clips per chip, and chips, where a step is assumed
RECIPES = {"vggsound": 180_000, "audioset": 2_000_000}  # clips of an epoch
ASSUMED = [(size, kind) for size in ("base", "large", "huge") for kind in ("factorized", "dense")]
TOPOLOGIES = ("v5e:4x4", "v5p:2x2x4", "v6e:4x4")


def load(path: str) -> dict:
    """The figures of one `benchmark pod`. Raises UserError where the file is none."""
    try:
        figures = json.loads(pathlib.Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read the figures {path}: {error}") from error
    if "topology" not in figures:
        raise UserError(f"{path} holds no figures of benchmark pod: write them with its --json={path}")
    return figures


def assumed(label: str, model: AVMAEConfig, name: str, share: float, chips: int, batch: int) -> dict:
    """Figures of a step that was not compiled, at `share` of the chips' peak; fsdp as its memory asks."""
    chip = pod.known_topologies()[name][0]
    parameters = count_layers(model)
    needed = BYTES_PER_PARAMETER * parameters / (STATE_SHARE * chip.memory)
    fsdp = next(n for n in range(1, chips + 1) if chips % n == 0 and n >= needed)
    flops = PASSES * closed_form_flops(model) * batch / chips
    return {
        "config": label,
        "topology": name,
        "chips": chips,
        "batch_size": batch,
        "fits": True,
        "mesh": {"fsdp": fsdp},
        "parameters": parameters,
        "closed_form_flops": flops,
        "seconds": {"compute": flops / (share * chip.flops), "memory": 0.0},
    }


def assumed_steps(share: float) -> list[dict]:
    """The sizes and kinds with CLIPS clips per chip, and the published recipes, on each kind of chip."""
    steps = [
        assumed(f"{size}_{kind}", sized_model(size, kind), name, share, CHIPS_EACH, CLIPS * CHIPS_EACH)
        for name in TOPOLOGIES
        for size, kind in ASSUMED
    ]
    for variant, clips in RECIPES.items():
        config = load_recipe(f"configs/pretrain.py:{variant}")
        steps += [
            assumed(variant, config.model, name, share, CHIPS_EACH, config.batch_size)
            | {"recipe_clips": config.epochs * clips}
            for name in TOPOLOGIES
        ]
    return steps


@functools.cache
def count_layers(model: AVMAEConfig) -> int:
    """Parameters of a model whose streams are equally deep: counted with one and with two encoder layers."""

    def count(depth: int) -> int:
        streams = {name: dataclasses.replace(getattr(model, name), depth=depth) for name in ("image", "audio")}
        return count_parameters(Pretraining(dataclasses.replace(model, **streams)))

    one, two = count(1), count(2)
    return one + (model.layers - 1) * (two - one)


def local_seconds(figures: dict) -> float:
    """Seconds of the step without exchanges."""
    return max(figures["seconds"]["compute"], figures["seconds"]["memory"])


def compiled_row(figures: dict) -> tuple[str, ...]:
    """One compiled step as text."""
    if not figures["fits"]:
        total = figures["bytes_per_chip"]["total"]
        return figures["config"], figures["topology"], "", f"{total / 1e9:.1f}, does not fit", "", "", "", "", ""
    kinds = {kind: one["seconds"] + one["hidden_seconds"] for kind, one in figures["collectives"].items()}
    return (
        figures["config"],
        figures["topology"],
        str(figures["batch_size"] // figures["chips"]),
        f"{figures['bytes_per_chip']['total'] / 1e9:.1f}",
        f"{figures['flops'] / 1e12:.2f}",
        f"{figures['flops'] / figures['closed_form_flops'] - 1:+.1%}",
        f"{1e3 * figures['predicted_step_seconds']:.1f}",
        f"{figures['predicted_mfu']:.2f}",
        max(kinds, key=kinds.get, default="none"),
    )


def derived_row(figures: dict) -> tuple[str, ...]:
    """The step on other numbers of chips at the same clips per chip: efficiency, and what limits it on most chips."""
    rows = pod.curve(figures, figures["topology"])
    return (
        figures["config"],
        figures["topology"].split(":")[0],
        str(figures["mesh"]["fsdp"]),
        f"{1e3 * local_seconds(figures):.1f}",
        *(f"{row['efficiency']:.2f}" for row in rows),
        rows[-1]["limit"],
    )


def recipe_rows(figures: dict) -> list[tuple[str, ...]]:
    """Hours of a recipe whose batch stays the same, on as many chips as divide it, and the host cores for its input."""
    chip, batch = pod.known_topologies()[figures["topology"]][0], figures["batch_size"]
    rows = []
    for chips in (count for count in pod.COUNTS if batch % count == 0):
        exchanged = roofline.parallel_exchanges(chip, chips, figures["mesh"]["fsdp"], figures["parameters"])
        seconds = local_seconds(figures) * figures["chips"] / chips + sum(exchanged.values())
        hours = figures["recipe_clips"] / batch * seconds / 3600
        rows.append(
            (
                figures["config"],
                figures["topology"].split(":")[0],
                str(chips),
                str(batch // chips),
                f"{batch / seconds:,.0f}",
                f"{hours:.2f}",
                f"{batch / seconds / pod.CLIPS_PER_CORE:.0f}",
            )
        )
    return rows


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.benchmark.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="what `benchmark pod --json=FILE` wrote")
    parser.add_argument(
        "--share",
        type=float,
        default=0.0,
        metavar="S",
        help="also steps that were not compiled, at this share of the peak, e.g. 0.4",
    )
    parser.add_argument("--plot", metavar="FILE", help="write a PNG of predicted efficiency over chips")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.share <= 1 or not (arguments.files or arguments.share):
        raise UserError(f"--share={arguments.share} must be between 0 and 1, and above 0 where no FILE is given")
    compiled = [load(path) for path in arguments.files]
    derived = [figures for figures in compiled if figures["fits"]]
    derived += assumed_steps(arguments.share) if arguments.share else []
    if compiled:
        print(
            timing.table(
                [
                    (
                        "compiled",
                        "topology",
                        "clips per chip",
                        "GB per chip",
                        "TFLOP per chip",
                        "beside closed form",
                        "step ms",
                        "MFU",
                        "largest exchange",
                    ),
                    *map(compiled_row, compiled),
                ]
            )
            + "\n"
        )
    print(
        timing.table(
            [("efficiency", "chip", "fsdp", "step ms", *map(str, pod.COUNTS), "limit"), *map(derived_row, derived)]
        )
        + "\n"
    )
    print(
        timing.table(
            [
                ("recipe", "chip", "chips", "clips per chip", "clips/s", "hours", "host cores"),
                *(row for figures in derived if "recipe_clips" in figures for row in recipe_rows(figures)),
            ]
        )
    )
    if arguments.plot:
        curves = {}
        for figures in derived:
            panel = curves.setdefault(figures["topology"].split(":")[0], {})
            panel[figures["config"]] = pod.curve(figures, figures["topology"])
        roofline.plot(curves, arguments.plot)


if __name__ == "__main__":
    run_command(main)
