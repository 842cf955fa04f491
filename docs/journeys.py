"""Which functions of av_mae a clip passes, in order of entry: `python docs/journeys.py`.

Three journeys are run with a profiler on a small set that the script makes: mp4 → shard, shard → loss and clip →
embedding. A function counts once, however often it is entered; comprehensions, lambdas and what runs once per process
or run (opening, compiling, making models) do not count, nor does what other packages do.

Two counts are printed. The first is of all functions entered. The second is of *hops*: functions that a reader has to
open to follow the clip. No hops are, in the list after a dash and with the reason,

- "nested": functions inside a function, which are read with the one around them,
- "expression": properties and functions of one expression, whose names say what they return,
- "once": those whose result is kept for the life of the process (`functools.cache`),
- "check": those that only compare settings with their rules (`check…`, `require`, all of models/config.py),
- "layer": further methods of a layer (nnx.Module), whose class is one hop,
- "devices": those that say where parameters and activations lie on a mesh (train/sharding.py and what calls it in
  models/layers.py),
- "update": those of the backward pass and of the optimizer, which come after the loss.
"""

import ast
import dataclasses
import pathlib
import sys
import tempfile
import types
from collections.abc import Callable

import jax
from flax import nnx

import av_mae
from av_mae import loading, models, preprocess, recipes
from av_mae.media.decode import read_excerpt
from av_mae.prepare import __main__ as prepare
from av_mae.prepare.clips import RecordOptions, make_record
from av_mae.prepare.readers.catalogue import SourceClip
from av_mae.prepare.shards import encoder
from av_mae.train.loop import to_global
from av_mae.train.run import open_run

ROOT = f"{pathlib.Path(av_mae.__file__).resolve().parent}/"


@dataclasses.dataclass(frozen=True)
class Entered:
    """A function of the package that a clip enters; `reason`: why it is no hop, '' where it is one."""

    file: str
    name: str
    reason: str


def entered(action: Callable[[], object], end: str = "") -> list[Entered]:
    """All functions of the package that `action` enters, each once, in order; after `end` returned comes the update."""
    found: dict[tuple[str, str], Entered] = {}
    layers: set[str] = set()
    ended = False

    def profile(frame: types.FrameType, event: str, _: object) -> None:
        nonlocal ended
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(ROOT) or code.co_name.startswith("<"):
            return
        file, name = code.co_filename.removeprefix(ROOT), code.co_qualname
        if event == "call" and (file, name) not in found:
            reason = "update" if ended else why_no_hop(file, code)
            layer = f"{file}: {name.split('.')[0]}" if isinstance(frame.f_locals.get("self"), nnx.Module) else ""
            if layer and not reason:
                reason = "layer" if layer in layers else ""
                layers.add(layer)
            found[file, name] = Entered(file, name, reason)
        ended |= event == "return" and name == end

    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(None)
    return list(found.values())


def why_no_hop(file: str, code: types.CodeType) -> str:
    """Why a function is no hop whatever the journey, see above; '' for none of the reasons."""
    if "<locals>" in code.co_qualname:
        return "nested"
    if code.co_name.lstrip("_").startswith(("check", "require")) or file == "models/config.py":
        return "check"
    if file == "train/sharding.py" or code.co_name in ("constrain", "activation_sharding"):
        return "devices"
    tree = ast.parse(pathlib.Path(ROOT, file).read_text())
    own = next(x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef) and spans(x, code))
    if any("cache" in ast.unparse(decorator) for decorator in own.decorator_list):
        return "once"
    body = own.body[1:] if ast.get_docstring(own) else own.body
    in_class = any(own in x.body for x in ast.walk(tree) if isinstance(x, ast.ClassDef))
    short = len(body) <= 1 and (not body or isinstance(body[0], ast.Return))
    return "expression" if short and not (in_class and code.co_name == "__call__") else ""


def spans(function: ast.FunctionDef, code: types.CodeType) -> bool:
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    return function.name == code.co_name and code.co_firstlineno == first


def show(title: str, functions: list[Entered]) -> None:
    hops = [one for one in functions if not one.reason]
    files = [len({one.file for one in group}) for group in (functions, hops)]
    print(f"\n{title}: {len(functions)} functions in {files[0]} files, of which {len(hops)} hops in {files[1]}")
    for one in functions:
        print(f"  {one.file}: {one.name}" + f" – {one.reason}" * bool(one.reason))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        prepare.main(["--dataset=toy_band", f"--output={folder}/set", "--clips=8", "--test_clips=2", "--workers=1"])
        mp4 = str(next(pathlib.Path(folder).rglob("*.mp4")))
        clip, encode = SourceClip("clip", "train", "clip.mp4"), encoder(["a class"])
        show("mp4 → shard", entered(lambda: encode(make_record(clip, {"clip.mp4": mp4}, RecordOptions()).record)))

        values = [f"data.path={folder}/set", "data.weights=None", "data.workers=0", "batch_size=4"]
        values += [f"model.{part}.depth=1" for part in ("image", "audio", "decoder")]
        config = recipes.load_recipe("configs/demo.py", [f"--config.{value}" for value in values])
        with open_run(config) as (step, data, _):
            state, batches = step.abstract_state(), data.host_batches(0)
            warm = batches[0]  # opens the shards
            assert warm["valid"].all()
            traced = lambda: jax.eval_shape(step.train_step, state, to_global(batches[1], step.rows))
            show("shard → loss", entered(traced, end="Pretraining.losses"))

        model = models.AVMAE(config.model, rngs=nnx.Rngs(0))
        model.sound = config.data.sound
        excerpt = {"duration": 1.5, "sound": model.sound, "image_size": config.model.image.size}
        preprocess.load(mp4, **excerpt)  # starts the decoding process
        journey = entered(lambda: preprocess.load(mp4, **excerpt))
        inside = entered(lambda: read_excerpt(mp4, None, 1.5))  # in the decoding process
        batch = preprocess.load(mp4, **excerpt)
        encoding = entered(lambda: loading.encode(model, batch))
        show("clip → embedding", list(dict.fromkeys([*journey, *inside, *encoding])))


if __name__ == "__main__":
    main()
