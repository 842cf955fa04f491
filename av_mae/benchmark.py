"""`python -m av_mae.benchmark step|fusion`: timings, FLOPs and memory, measured as ratios within one run."""

import argparse
import json
import pathlib

from av_mae import recipes
from av_mae.errors import UserError, run_command
from av_mae.sizes import SIZES

EXAMPLE = """example:
  python -m av_mae.benchmark step --config=configs/pretrain.py:base --config.batch_size=8 \\
      --config.dtype=float32 --plain --json=step.json
  python -m av_mae.benchmark fusion --plot=fusion.png
"""


def human(figures: dict) -> list[tuple[str, str]]:
    """Figures as rows of text with units."""
    units = {"seconds": ("{:.3f} s", 1), "bytes": ("{:.2f} GB", 1e-9), "clip": ("{:.2f} GFLOP", 1e-9),
             "flops_per_second": ("{:.1f} GFLOP/s", 1e-9), "share": ("{:.3f}", 1), "mfu": ("{:.3f}", 1)}
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
    from av_mae.benchmarks import step, timing

    config = recipes.load_recipe(arguments.config, overrides)
    figures = {"config": arguments.config} | step.measure(config, arguments.rounds, arguments.plain)
    print(timing.table(human(figures)))
    return figures


def run_fusion(arguments: argparse.Namespace, overrides: list[str]) -> dict:
    from av_mae.benchmarks import fusion, timing

    if overrides:
        raise UserError(f"benchmark fusion takes no {overrides[0]}: set --size and --batch")
    rows = fusion.measure(arguments.batch, arguments.rounds, SIZES[arguments.size])
    head = ("kind", "pairs", "image", "audio", "ms", "MFLOP per clip", "temporary MB")
    print(timing.table([head] + [
        (r["kind"], r["pair_attention"], str(r["image_tokens"]), str(r["audio_tokens"]), f"{1e3 * r['seconds']:.2f}",
         f"{r['flops_per_clip'] / 1e6:.1f}", f"{r['memory_bytes'] / 1e6:.1f}") for r in rows]))
    if arguments.plot:
        fusion.plot(rows, arguments.plot)
    return {"rows": rows}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.benchmark", description=__doc__, epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="a training step of a recipe on random clips")
    recipes.add_config_argument(step)
    step.add_argument("--plain", action="store_true", help="also run the plain formulation, in turn")
    fusion = commands.add_parser("fusion", help="fusion kinds × implementations over token counts")
    fusion.add_argument("--size", default="base", choices=sorted(SIZES), help="width and heads (default: base)")
    fusion.add_argument("--batch", type=int, default=8, help="clips (default: 8)")
    fusion.add_argument("--plot", metavar="FILE", help="write a PNG of time and memory over tokens")
    for command, rounds in ((step, 5), (fusion, 9)):
        command.add_argument("--rounds", type=int, default=rounds, help=f"timed rounds (default: {rounds})")
        command.add_argument("--json", metavar="FILE", help="write the figures to this file")
    arguments, overrides = recipes.parse_arguments(parser, argv)
    if arguments.rounds < 1:
        raise UserError(f"--rounds={arguments.rounds} must be at least 1")
    figures = {"step": run_step, "fusion": run_fusion}[arguments.command](arguments, overrides)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
