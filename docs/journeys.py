"""Which functions of av_mae a clip passes, in order of entry: `python docs/journeys.py`.

Three journeys are run with a profiler on a small set that the script makes: mp4 → shard, shard → loss and clip →
embedding. A function counts once, however often it is entered; comprehensions, lambdas and what runs once per process
or run (opening, compiling, making models) do not count, nor does what other packages do.
"""

import pathlib
import sys
import tempfile
from collections.abc import Callable

import jax
from flax import nnx

import av_mae
from av_mae import models, preprocess, recipes
from av_mae.media.decode import read_excerpt
from av_mae.prepare import __main__ as prepare
from av_mae.prepare.clips import RecordOptions, make_record
from av_mae.prepare.readers.catalogue import SourceClip
from av_mae.prepare.shards import encoder
from av_mae.train.loop import to_global
from av_mae.train.run import open_run

ROOT = pathlib.Path(av_mae.__file__).resolve().parent


def entered(action: Callable[[], object]) -> list[str]:
    """'file: function' of all functions of the package that `action` enters, each once, in order."""
    found: dict[str, None] = {}

    def profile(frame, event, _):
        code = frame.f_code
        path = pathlib.Path(code.co_filename)
        if event == "call" and path.is_relative_to(ROOT) and not code.co_name.startswith("<"):
            found.setdefault(f"{path.relative_to(ROOT)}: {code.co_qualname}")

    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(None)
    return list(found)


def show(title: str, functions: list[str]) -> None:
    print(f"\n{title}: {len(functions)} functions in {len({name.split(':')[0] for name in functions})} files")
    for name in functions:
        print(f"  {name}")


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
            show(
                "shard → loss",
                entered(lambda: jax.eval_shape(step.train_step, state, to_global(batches[1], step.rows))),
            )

        model = models.AVMAE(config.model, rngs=nnx.Rngs(0))
        model.sound = config.data.sound
        excerpt = {"duration": 1.5, "sound": model.sound, "image_size": config.model.image.size}
        preprocess.load(mp4, **excerpt)  # starts the decoding process
        journey = entered(lambda: preprocess.load(mp4, **excerpt))
        inside = entered(lambda: read_excerpt(mp4, None, 1.5))  # in the decoding process
        batch = preprocess.load(mp4, **excerpt)
        show(
            "clip → embedding", list(dict.fromkeys([*journey, *inside, *entered(lambda: av_mae.encode(model, batch))]))
        )


if __name__ == "__main__":
    main()
