"""Peak memory of converting a checkpoint three quarters of which are its optimizer.

`python tests/convert_memory.py FOLDER [--size=base]` writes a published checkpoint of that size into FOLDER (4 GB for
base), converts it in a process of its own, and prints the peak of that whole process beside the model's size.
"""

import argparse
import math
import pathlib
import subprocess
import sys
import zipfile

import numpy as np
from flax import nnx
from hostile_files import ORDERED_DICT, checkpoint, items, number, storage, tensor

from av_mae import models
from av_mae.config import sized_model
from av_mae.convert.names import names_of
from av_mae.models.kinds import flat_values
from av_mae.models.layers import sin_cos_2d

SCRIPT = """
import sys
from av_mae import convert
convert.main(sys.argv[1:])
print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])
"""


def published_shapes(config: models.AVMAEConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a pretraining checkpoint."""
    model = nnx.eval_shape(lambda: models.AVMAE(config, rngs=nnx.Rngs(0)))
    names, shapes = names_of(model), {path: x.shape for path, x in flat_values(model).items()}
    return {name: rule.shape(shapes) for name, rule in names.rules.items()} | {
        name: buffer.shape for name, buffer in names.buffers.items()
    }


def write_checkpoint(path: pathlib.Path, config: models.AVMAEConfig, moments: int = 3) -> int:
    """A PyTorch zip file of random weights, `moments` times as large an optimizer beside them; returns their bytes."""
    shapes, buffers = (
        published_shapes(config),
        {
            f"encoder.{name}.pos_embed": sin_cos_2d(stream.grid, stream.width)
            for name, stream in (("image", config.image), ("audio", config.audio))
        },
    )
    keys, tile = {}, np.random.default_rng(0).standard_normal(2**20).astype(np.float32)

    def pickled(name: str, shape: tuple[int, ...]) -> bytes:
        keys[name] = str(len(keys))
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        return tensor(storage(key=keys[name], count=math.prod(shape)), shape=shape, strides=strides)

    state = [(name, pickled(name, shape)) for name, shape in shapes.items()]
    optimizer = [
        (f"{moment}.{name}", pickled(f"{moment}.{name}", shape))
        for moment in range(moments)
        for name, shape in shapes.items()
    ]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "archive/data.pkl",
            checkpoint(
                ("state_dict", ORDERED_DICT + items(*state)),
                ("optimizer", ORDERED_DICT + items(*optimizer)),
                ("epoch", number(3)),
            ),
        )
        for name, key in keys.items():
            with archive.open(f"archive/data/{key}", "w", force_zip64=True) as file:
                own = name.partition(".")[2] if name[0].isdigit() else name
                write_values(file, buffers.get(name), shapes[own], tile)
    return sum(4 * math.prod(shape) for shape in shapes.values())


def write_values(file, values: np.ndarray | None, shape: tuple[int, ...], tile: np.ndarray) -> None:
    """The given float32 values, or as many of the random ones as the shape holds."""
    if values is not None:
        file.write(values.tobytes())
        return
    left = math.prod(shape)
    while left > 0:
        file.write(tile[:left].tobytes())
        left -= len(tile)


def peak_of_converting(source: pathlib.Path, output: pathlib.Path) -> int:
    """Bytes: the largest resident size of the process that converts, all that it imports included."""
    command = [sys.executable, "-c", SCRIPT, f"--source={source}", f"--output={output}"]
    result = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=pathlib.Path(__file__).resolve().parent.parent
    )
    return 1024 * int(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--size", default="base")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    source = arguments.folder / "checkpoint.pth"
    model = write_checkpoint(source, sized_model(arguments.size))
    peak = peak_of_converting(source, arguments.folder / "converted")
    print(
        f"file {source.stat().st_size / 1e9:.2f} GB, model {model / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB: "
        f"{peak / model:.2f} times the model"
    )


if __name__ == "__main__":
    main()
