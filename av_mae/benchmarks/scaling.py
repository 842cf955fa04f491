"""`python -m av_mae.benchmarks.scaling FILE...`: tables of docs/scaling.md from what `benchmark pod --json` wrote.

A row of each compiled step, and rows derived from it for other numbers of the same chips: the step without exchanges
takes as long at the same clips per chip (and in proportion to them where a recipe's batch is kept), the exchanges are
those of data and fully sharded parallelism by the roofline.
"""

import argparse
import json
import pathlib

from av_mae.benchmarks import pod, roofline, timing
from av_mae.errors import UserError, run_command


def load(path: str) -> dict:
    """The figures of one `benchmark pod`. Raises UserError where the file is none."""
    try:
        figures = json.loads(pathlib.Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read the figures {path}: {error}") from error
    if "topology" not in figures:
        raise UserError(f"{path} holds no figures of benchmark pod: write them with its --json={path}")
    return figures


def local_seconds(figures: dict) -> float:
    """Seconds of the step without exchanges."""
    return max(figures["seconds"]["compute"], figures["seconds"]["memory"])


def compiled_row(figures: dict) -> tuple[str, ...]:
    """One compiled step as text."""
    if not figures["fits"]:
        total = figures["bytes_per_chip"]["total"]
        return figures["config"], figures["topology"], "", f"{total / 1e9:.1f}, does not fit", "", "", "", "", ""
    kinds = {kind: one["seconds"] + one["hidden_seconds"] for kind, one in figures["collectives"].items()}
    return (figures["config"], figures["topology"], str(figures["batch_size"] // figures["chips"]),
            f"{figures['bytes_per_chip']['total'] / 1e9:.1f}", f"{figures['flops'] / 1e12:.2f}",
            f"{figures['flops'] / figures['closed_form_flops'] - 1:+.1%}",
            f"{1e3 * figures['predicted_step_seconds']:.1f}", f"{figures['predicted_mfu']:.2f}",
            max(kinds, key=kinds.get, default="none"))


def derived_rows(figures: dict) -> list[tuple[str, ...]]:
    """Other numbers of chips at the same clips per chip."""
    peak = pod.known_topologies()[figures["topology"]][0].flops
    rows = []
    for row in pod.curve(figures, figures["topology"]):
        seconds = local_seconds(figures) + row["exchange_seconds"]
        rows.append((figures["config"], f"{figures['topology'].split(':')[0]}:{row['shape']}", str(row["slices"]),
                     str(row["chips"]), f"{1e3 * seconds:.1f}", f"{figures['closed_form_flops'] / seconds / peak:.2f}",
                     f"{row['efficiency']:.3f}", row["limit"]))
    return rows


def recipe_rows(figures: dict) -> list[tuple[str, ...]]:
    """Hours of a recipe whose batch stays the same, on as many chips as divide it, and the host cores for its input."""
    chip, batch = pod.known_topologies()[figures["topology"]][0], figures["batch_size"]
    rows = []
    for chips in (count for count in pod.COUNTS if batch % count == 0):
        exchanged = roofline.parallel_exchanges(chip, chips, figures["mesh"]["fsdp"], figures["parameters"])
        seconds = local_seconds(figures) * figures["chips"] / chips + sum(exchanged.values())
        hours = figures["recipe_clips"] / batch * seconds / 3600
        rows.append((figures["config"], figures["topology"].split(":")[0], str(chips), str(batch // chips),
                     f"{batch / seconds:,.0f}", f"{hours:.2f}", f"{batch / seconds / pod.CLIPS_PER_CORE:.0f}"))
    return rows


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m av_mae.benchmarks.scaling", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="what `benchmark pod --json=FILE` wrote")
    parser.add_argument("--plot", metavar="FILE", help="write a PNG of predicted efficiency over chips")
    arguments = parser.parse_args(argv)
    every = [load(path) for path in arguments.files]
    fitting = [figures for figures in every if figures["fits"]]
    print(timing.table([("compiled", "topology", "clips per chip", "GB per chip", "TFLOP per chip", "beside closed form",
                         "step ms", "MFU", "largest exchange"), *map(compiled_row, every)]) + "\n")
    print(timing.table([("derived", "slice", "slices", "chips", "step ms", "MFU", "efficiency", "limit"),
                        *(row for figures in fitting for row in derived_rows(figures))]) + "\n")
    print(timing.table([("recipe", "chip", "chips", "clips per chip", "clips/s", "hours", "host cores"),
                        *(row for figures in fitting if "recipe_clips" in figures for row in recipe_rows(figures))]))
    if arguments.plot:
        roofline.plot({f"{figures['config']} on {figures['topology'].split(':')[0]}":
                       pod.curve(figures, figures["topology"]) for figures in fitting}, arguments.plot)


if __name__ == "__main__":
    run_command(main)
