"""Recipes: `x[:variant]` or `configs/x.py[:variant]` plus `--config.a.b=value` become one checked, frozen dataclass.

A config file defines `get_config(variant: str) -> ml_collections.ConfigDict`, made by `as_recipe` (locked). The
types of values come from the dataclass that the recipe fills, so lists, tuples, None and whole numbers for floats work.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import json
import math
import os
import pathlib
import runpy
import sys
import types
import typing

import ml_collections

from av_mae.config import TrainConfig
from av_mae.errors import UserError
from av_mae.storage import replace_file

PREFIX = "--config."
RENAMED = {"data.truth": "data.annotations"}  # keys of older runs and commands → what they are called now
# The shipped recipes: within the package where it is installed from a wheel, else beside it in the repository.
_PACKAGE = pathlib.Path(__file__).resolve().parent
RECIPES = next((folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()), _PACKAGE)


def as_recipe(config: typing.Any) -> ml_collections.ConfigDict:
    """A dataclass as a locked ConfigDict, for config files to change field by field.

    Locked: a misspelt key fails in the file that writes it. Types are checked once, when `from_dict` reads it.
    """
    return ml_collections.ConfigDict(to_dict(config, lists=False), type_safe=False).lock()


def load_recipe(
    spec: str, overrides: typing.Sequence[str] = (), kind: type | typing.Callable[[dict], type] = TrainConfig
):
    """Loads `path.py[:variant]`, applies `--config.a.b=value` overrides and returns a checked `kind`.

    Args:
      spec: `NAME[:VARIANT]` of a shipped recipe, e.g. `demo:band`, or `FILE.py[:VARIANT]` from the working directory;
        `configs/NAME.py` names a shipped recipe from anywhere.
      overrides: strings as given on the command line.
      kind: the frozen dataclass that the recipe fills, or a function that tells it from the recipe's values.

    Returns:
      The recipe as a `kind`, every value checked.

    Raises:
      UserError: unknown file, variant or key (naming the nearest right key), a value of the wrong type, or a value
        that breaks a rule of the dataclasses.
    """
    values = _call_get_config(spec).to_dict()
    known = kind if isinstance(kind, type) else kind(values)
    for override in overrides:
        _apply(known, values, override)
    _replace_length(values, {override.removeprefix(PREFIX).partition("=")[0] for override in overrides})
    return from_dict(values, known if isinstance(kind, type) else kind(values))


def _replace_length(values: dict, given: set[str]) -> None:
    """`steps` that are given on the command line replace the recipe's `epochs`, and the other way round."""
    for name, other in (("steps", "epochs"), ("epochs", "steps")):
        if name in given and other not in given and values.get(name) and values.get(other):
            text = f"{name}={values[name]} replaces {other}={values[other]}"
            warmup = values.get("optimizer", {}).get("warmup")
            print(f"{text}; optimizer.warmup={warmup} counts {name} now" if warmup else text, file=sys.stderr)
            values[other] = 0


def to_dict(config: typing.Any, lists: bool = True) -> typing.Any:
    """A dataclass as nested dicts that JSON can hold (`lists`: tuples become lists)."""
    if dataclasses.is_dataclass(config):
        return {field.name: to_dict(getattr(config, field.name), lists) for field in dataclasses.fields(config)}
    if lists and isinstance(config, tuple):
        return [to_dict(value) for value in config]
    return config


def from_dict(values: typing.Mapping, kind: type = TrainConfig, prefix: str = ""):
    """The inverse of `to_dict`: nested mappings → `kind`, every key and type checked. Missing keys keep defaults."""
    hints = typing.get_type_hints(kind)
    fields = {}
    for key, value in values.items():
        dotted = RENAMED.get(prefix + key, prefix + key)
        name = dotted.removeprefix(prefix)
        if name not in hints:
            raise UserError(_unknown_key(dotted, [prefix + known for known in keys(kind)]))
        fields[name] = _convert(value, hints[name], dotted)
    return kind(**fields)


def save(config, path: str | os.PathLike) -> None:
    """Writes a config as JSON."""
    replace_file(path, json.dumps(to_dict(config), indent=2) + "\n")


def load(path: str | os.PathLike, kind: type = TrainConfig):
    """Reads what `save` wrote. Raises UserError when the file is not there or is no such config."""
    try:
        values = json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read the config {path}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"the config {path} must hold an object, it holds {type(values).__name__}")
    return from_dict(values, kind)


def keys(kind: type, prefix: str = "") -> list[str]:
    """All dotted keys of a config dataclass that hold a value."""
    names = []
    for name, hint in typing.get_type_hints(kind).items():
        group = _group(hint)
        names += keys(group, f"{prefix}{name}.") if group else [prefix + name]
    return names


def add_config_argument(parser: argparse.ArgumentParser, *kinds: type) -> None:
    """Adds `--config`; the help says how single values are overridden, and names the keys of the given dataclasses."""
    names = dict.fromkeys(name for kind in kinds or (TrainConfig,) for name in keys(kind))
    parser.add_argument(
        "--config",
        required=True,
        metavar="RECIPE[:VARIANT]",
        help="recipe, e.g. demo or configs/demo.py; override single values with --config.KEY=VALUE, "
        f"e.g. --config.batch_size=128; keys: {', '.join(names)}",
    )


def parse_arguments(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parses a command line; returns the named arguments and the `--config.KEY=VALUE` overrides.

    `--config.KEY VALUE` is understood too. Anything else that the parser does not know ends the program.
    """
    arguments, rest = parser.parse_known_args(argv)
    overrides = []
    while rest:
        word = rest.pop(0)
        if not word.startswith(PREFIX):
            parser.error(f"unrecognized argument: {word}")
        if "=" not in word and not rest:
            parser.error(f"{word} needs a value: {word}=VALUE")
        overrides.append(word if "=" in word else f"{word}={rest.pop(0)}")
    return arguments, overrides


def _call_get_config(spec: str) -> ml_collections.ConfigDict:
    name, _, variant = spec.partition(":")
    candidates = [RECIPES / f"{name}.py", pathlib.Path(name), RECIPES.parent / name]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.py")))
        raise UserError(f"no recipe {name!r}; it is a file, or one of the recipes {known or '(none here)'}")
    module = runpy.run_path(str(path), run_name=f"recipe_{path.stem}")
    get_config = module.get("get_config")
    if get_config is None:
        raise UserError(f"{path} is no recipe: it defines no get_config(variant)")
    variants = module.get("VARIANTS")
    if variants is not None and variant and variant not in variants:
        raise UserError(
            f"{name} has no variant {variant!r}{_nearest(variant, variants)}; variants: {', '.join(variants)}"
        )
    if variant and not inspect.signature(get_config).parameters:
        raise UserError(f"{name} has no variants, got {variant!r}")
    return get_config(variant) if variant else get_config()


def _apply(kind: type, values: dict, override: str) -> None:
    """Writes one `--config.a.b=value` into nested dicts, its text read as the field's type."""
    if not override.startswith(PREFIX) or "=" not in override:
        raise UserError(f"an override reads --config.KEY=VALUE, got {override!r}")
    dotted, text = override[len(PREFIX) :].split("=", 1)
    dotted = RENAMED.get(dotted, dotted)
    known = keys(kind)
    if dotted not in known:
        raise UserError(_unknown_key(dotted, known))
    *groups, last = dotted.split(".")
    for group in groups:
        kind, values = _group(typing.get_type_hints(kind)[group]), values.setdefault(group, {})
    values[last] = _read(text, typing.get_type_hints(kind)[last], dotted)


def _group(hint: typing.Any) -> typing.Any:
    """The dataclass that a field holds, or `None` if it holds a value."""
    return hint if dataclasses.is_dataclass(hint) else None


def _unknown_key(dotted: str, known: list[str]) -> str:
    inside = [key for key in known if key.startswith(dotted + ".")]
    if inside:
        return f"{dotted!r} is a group of keys: set one of {', '.join(inside)}"
    return f"unknown config key {dotted!r}{_nearest(dotted, known)}"


def _nearest(word: str, known: typing.Iterable[str]) -> str:
    """`; did you mean …?` with the most similar name, judged by the whole name and by its last part."""
    known = list(known)
    last = word.rpartition(".")[2]

    def likeness(name: str) -> float:
        whole = difflib.SequenceMatcher(None, word, name).ratio()
        return max(whole, difflib.SequenceMatcher(None, last, name.rpartition(".")[2]).ratio() * 0.99)

    best = max(known, key=likeness, default=None)
    return f"; did you mean {best!r}?" if best is not None else ""


def _members(hint) -> tuple:
    """The alternatives of a union, or the type alone."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _read(text: str, hint, key: str):
    """Text of the command line → a value of the field's type."""
    members = _members(hint)
    if members == (str,):
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        value = text
    if isinstance(value, tuple | list) or not any(typing.get_origin(member) is tuple for member in members):
        return _convert(value, hint, key)
    if any(member in (int, str, type(None)) and isinstance(value, member) for member in members):
        return value
    return _convert((value,), hint, key)


def _convert(value, hint, key: str):
    """Checks a value against a field's type. Whole floats become int, ints become float, lists become tuples."""
    group = _group(hint)
    if group is not None:
        if not isinstance(value, typing.Mapping):
            raise UserError(f"config key {key!r} is a group of keys, got {value!r}")
        return from_dict(value, group, f"{key}.")
    for member in _members(hint):
        converted = _convert_member(value, member)
        if converted is not _MISMATCH:
            return converted
    raise UserError(f"config key {key!r} must be {_describe(hint)}, got {value!r}")


_MISMATCH = object()


def _convert_member(value, member):
    if member is type(None):
        return None if value is None else _MISMATCH
    if typing.get_origin(member) is tuple:
        return _convert_tuple(value, typing.get_args(member))
    if isinstance(value, bool) and member is not bool:
        return _MISMATCH
    if member is float and isinstance(value, int):
        return float(value) if abs(value) < 10**300 else math.inf
    if member is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, member) else _MISMATCH


def _convert_tuple(value, items: tuple):
    if not isinstance(value, tuple | list):
        return _MISMATCH
    if len(items) == 2 and items[1] is Ellipsis:
        items = (items[0],) * len(value)
    if len(items) != len(value):
        return _MISMATCH
    converted = tuple(_convert_member(entry, item) for entry, item in zip(value, items))
    return _MISMATCH if _MISMATCH in converted else converted


def _describe(hint) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "None"}
    return " or ".join(names.get(member, str(member)) for member in _members(hint))
