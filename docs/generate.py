"""Fills the generated parts of the pages, from the code: `python docs/generate.py`.

A part stands between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

import dataclasses
import inspect
import pathlib
import re
import types
import typing

from av_mae import config as sizes
from av_mae import recipes
from av_mae.config import TrainConfig
from av_mae.evaluate.task import TASKS, TaskConfig, task_class
from av_mae.models import flops
from av_mae.models.config import FUSION_KINDS
from av_mae.prepare.readers import READERS

DOCS = pathlib.Path(__file__).resolve().parent
PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def type_name(hint) -> str:
    """A field's type in words of Python: `int`, `float or None`, `tuple[int, int]`."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(type_name(member) for member in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"tuple[{', '.join('...' if item is Ellipsis else type_name(item) for item in typing.get_args(hint))}]"
    return "None" if hint is type(None) else hint.__name__


def table(header: list[str], rows: list[list[str]], right: bool = False) -> str:
    """A Markdown table; `right` aligns all columns but the first to the right."""
    rule = ["---"] + ["--:" if right else "---"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows]) + "\n"


def key_tables(kind: type, prefix: str = "", known: frozenset[str] = frozenset()) -> str:
    """A table of keys, types and defaults for a dataclass and each group in it, without the keys in `known`."""
    hints, rows, groups = typing.get_type_hints(kind), [], []
    for field in dataclasses.fields(kind):
        key = prefix + field.name
        if dataclasses.is_dataclass(field.default):
            groups.append(key_tables(type(field.default), f"{key}.", known))
        elif key not in known:
            rows.append([f"`{key}`", type_name(hints[field.name]), f"`{field.default!r}`"])
    own = f"{inspect.getdoc(kind)}\n\n{table(['key', 'type', 'default'], rows)}" if rows else ""
    title = f"### `{prefix.rstrip('.')}`\n\n" if prefix and own else ""
    return "\n".join(part for part in [title + own, *groups] if part)


def training_keys() -> str:
    return key_tables(TrainConfig)


def task_keys() -> str:
    """What evaluations have beside the keys of training."""
    known = frozenset(recipes.keys(TrainConfig))
    parts = [f"## All tasks with a head\n\n{key_tables(TaskConfig, known=known)}"]
    known |= frozenset(recipes.keys(TaskConfig)) - {"task"}
    for name in TASKS:
        kind = task_class(name).config_class
        own = known if issubclass(kind, TaskConfig) else frozenset()
        parts.append(f"## {name.capitalize()}\n\n{key_tables(kind, known=own)}")
    return "\n".join(parts)


def _gflop(value: int) -> str:
    return f"{value / 1e9:.1f}"


def encoder_costs() -> str:
    """One encoder pass of ViT-B for each kind of fusion, and with all pairs in memory where pairs separate."""
    rows = []
    for kind in FUSION_KINDS:
        config = sizes.sized_model("base", kind)
        forms = ("separable", "materialized") if kind in ("dense", "factorized") else (config.fusion.pair_attention,)
        for form in forms:
            costs = [_gflop(flops.encoder_flops(config, masked, form)) for masked in (True, False)]
            rows.append([kind, "–" if kind in ("none", "token") else form, *costs])
    return table(["kind", "pairs", "masked", "all patches"], rows, right=True)


def size_costs() -> str:
    """Forward pass of the training loss of each size, factorized, by part."""
    rows = []
    for name in sizes.SIZES:
        config = sizes.sized_model(name)
        parts = (
            flops.encoder_flops(config),
            flops.decoder_flops(config, config.image),
            flops.decoder_flops(config, config.audio),
            flops.closed_form_flops(config),
        )
        rows.append([name, *map(_gflop, parts)])
    return table(["size", "encoder", "image decoder", "sound decoder", "forward"], rows, right=True)


def dataset_sources() -> str:
    """What each reader reads, and under which licence."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, reader in list(READERS.items())[1:]:
        rows.setdefault((reader.description, reader.licence), []).append(f"`{name}`")
    return table(["`--dataset`", "data set", "licence"], [[", ".join(names), *texts] for texts, names in rows.items()])


PARTS = {
    "dataset_sources": dataset_sources,
    "training_keys": training_keys,
    "task_keys": task_keys,
    "encoder_costs": encoder_costs,
    "size_costs": size_costs,
}


def filled(text: str) -> str:
    """A page with its generated parts made anew."""
    return PART.sub(lambda match: f"{match[1]}{PARTS[match[2]]().rstrip()}\n{match[3]}", text)


if __name__ == "__main__":
    for page in sorted(DOCS.rglob("*.md")):
        page.write_text(filled(page.read_text()))
