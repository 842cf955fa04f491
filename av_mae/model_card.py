"""A model's card: `card.json` in its work directory, and the same for people in `README.md`.

Pretraining writes it at its end; evaluations of the run's checkpoints add their figures.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import av_mae
from av_mae import loading, recipes
from av_mae.checkpoint_files import find_checkpoint
from av_mae.config import TrainConfig
from av_mae.console import note
from av_mae.evaluate.bootstrap import Report
from av_mae.storage import reached, replace_file
from av_mae.workdir import last_metrics, original, read_metrics

CARD, README = "card.json", "README.md"
MARK = "<!-- Written by av_mae from card.json; remove this line to keep your own text. -->"
BOUNDS = ("value", "low", "high")  # of a figure
TRAINING = ("loss", "image_loss", "audio_loss", "clips_per_second", "skipped")


def write_card(workdir: pathlib.Path, config: TrainConfig, parameters: int) -> None:
    """The card of a finished run: its recipe, the last line of its metrics, the checksum of its last checkpoint.

    parameters: how many values the model has. A licence and evaluations that the card has already stay.
    """
    folder, known = find_checkpoint(os.fspath(original(workdir))), read_card(original(workdir)) or {}
    metrics = workdir / "metrics.jsonl"
    last = last_metrics(read_metrics(metrics)) if metrics.is_file() else {}  # a full disk may have kept it out
    _save(
        workdir,
        {
            "av_mae": av_mae.__version__,
            "checkpoint": f"{folder.parent.name}/{folder.name}",
            "sha256": loading.checksum(folder),
            "parameters": parameters,
            "licence": known.get("licence", ""),
            "training": {name: last[name] for name in TRAINING if name in last},
            "evaluations": known.get("evaluations", {}),
            "config": recipes.to_dict(config),
        },
    )


def add_evaluation(checkpoint: str, workdir: str | os.PathLike[str], task: str, data: str, report: Report) -> None:
    """Adds the figures of an evaluation in `workdir` to the card of the run that `checkpoint` is of.

    Nothing where that run has no card.
    """
    folder = find_checkpoint(checkpoint)
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    card = read_card(run)
    if card is not None:
        metrics = {name: metric.to_json() for name, metric in report.metrics.items()}
        card.setdefault("evaluations", {})[os.fspath(workdir)] = {
            "task": task,
            "data": data,
            "checkpoint": folder.name,
            "clips": report.clips,
            "skipped": report.skipped,
            "figures": metrics,
        }
        _save(run, card)


def read_card(workdir: pathlib.Path) -> dict[str, Any] | None:
    """The card of a run; `None` where it has none."""
    try:
        with reached(workdir):
            card = json.loads((workdir / CARD).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return card if isinstance(card, dict) and isinstance(card.get("evaluations", {}), dict) else None


def _save(workdir: pathlib.Path, card: Mapping[str, Any]) -> None:
    """Writes both files; a text that is not of this module is left."""
    readme = workdir / README
    try:
        text = render(card)
        with reached(workdir):
            replace_file(workdir / CARD, json.dumps(card, indent=2) + "\n")
            if not readme.exists() or (readme.is_file() and MARK in readme.read_bytes().decode(errors="replace")):
                replace_file(readme, text)
    except OSError as error:
        note(f"warning: the model card in {workdir} cannot be written ({error.strerror or error})")
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        note(f"warning: {workdir / CARD} is no card that av_mae wrote; it stays as it is")


def render(card: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    config = card["config"]
    model, data = config["model"], config["data"]
    fusion = model["fusion"]
    streams = [
        (
            name,
            "×".join(map(str, model[name]["size"])),
            *(model[name][key] for key in ("patch", "width", "depth", "heads", "mask_ratio")),
        )
        for name in ("image", "audio")
    ]
    length = f"{config['steps']} steps" if config["steps"] else f"{config['epochs']:g} epochs"
    lines = [
        "# Audio-visual masked autoencoder",
        "",
        MARK,
        "",
        f"Pretrained by masked reconstruction with early fusion, by av_mae {card['av_mae']}.",
        f"{card['parameters'] / 1e6:.1f} million parameters; licence: {card['licence'] or 'not stated'}.",
        "",
        "```python",
        "import av_mae",
        f'model = av_mae.load("…/{card["checkpoint"]}")',
        "```",
        "",
        "## Model",
        "",
        *_table(("stream", "input", "patch", "width", "depth", "heads", "masked"), streams),
        "",
        f"Fusion `{fusion['kind']}`, tokens {fusion['tokens']}, layers {fusion['layers']}. Sound: "
        + ", ".join(f"{name} {value}" for name, value in data["sound"].items())
        + ".",
        "",
        "## Data and training",
        "",
        f"`{data['path']}`, split `{data['split']}`; {length} of {config['batch_size']} clips, "
        f"{config['optimizer']['kind']}, base learning rate {config['optimizer']['base_lr']:g}, "
        f"seed {config['seed']}.",
        "",
        *_table(("at the end", "value"), [(name, f"{x:.4g}") for name, x in card["training"].items()]),
    ]
    for folder, found in card["evaluations"].items():
        lines += _evaluation_lines(folder, found)
    entry = ["[name]", 'path = "…"', f'sha256 = "{card["sha256"]}"', f'licence = "{card["licence"]}"']
    return "\n".join([*lines, "", "## Registry entry", "", "```toml", *entry, "```"]) + "\n"


def _evaluation_lines(folder: str, found: Mapping[str, Any]) -> list[str]:
    """The section of one evaluation, whose results lie in `folder`."""
    rows = [
        (name, *("–" if figure[key] is None else f"{figure[key]:.4g}" for key in BOUNDS))
        for name, figure in found["figures"].items()
    ]
    return [
        "",
        f"## {found['task'].capitalize()} on `{found['data']}`",
        "",
        f"Checkpoint {found['checkpoint']}, {found['clips']} clips ({found['skipped']} skipped), "
        f"95 % intervals; from `{folder}`.",
        "",
        *_table(("figure", *BOUNDS), rows),
    ]


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    return [
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
        *("| " + " | ".join(map(str, row)) + " |" for row in rows),
    ]
