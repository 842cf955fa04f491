"""The round trip file → checkpoint → safetensors as PyTorch sees it. Run by hand with a Python that has torch 2.13.0.

`python tests/convert_with_torch.py PYTHON GOLDEN` converts with the Python that has av_mae: each golden file, and
what torch saves of one of them in the older format, in half precisions, from distributed training with its optimizer.
Both ends are loaded by torch into plain dicts; names, order, types and bytes must be equal.
"""

import argparse
import json
import pathlib
import struct
import subprocess
import tempfile

import torch

OPTIONS = ["--heads=4", "--decoder_heads=4", "--tokens=6,4,2"]
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def load(path: pathlib.Path) -> dict[str, torch.Tensor]:
    """A checkpoint's state dict; safetensors are read by their description, into torch's own memory."""
    if path.suffix == ".pth":
        state = torch.load(path, weights_only=True)["state_dict"]
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        values = torch.frombuffer(bytearray(data[start + begin : start + end]), dtype=TYPES[entry["dtype"]])
        tensors[name] = values.reshape(entry["shape"])
    return tensors


def saved_by_torch(golden: pathlib.Path, folder: pathlib.Path) -> list[pathlib.Path]:
    """One golden model as torch saves it in other ways."""
    state = torch.load(golden / "dense_mmi.pth", weights_only=True)["state_dict"]
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in state.values()]
    optimizer = torch.optim.AdamW(parameters)
    sum(parameter.square().sum() for parameter in parameters).backward()
    optimizer.step()
    whole = {
        "state_dict": {f"module.{name}": tensor for name, tensor in state.items()},
        "epoch": 3,
        "optimizer": optimizer.state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
    }
    torch.save(whole, folder / "distributed.pth")
    torch.save(whole, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    for name, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16), ("double", torch.float64)):
        torch.save({"state_dict": {key: tensor.to(dtype) for key, tensor in state.items()}}, folder / f"{name}.pth")
    return [folder / f"{name}.pth" for name in ("distributed", "legacy", "half", "bfloat16", "double")]


def there_and_back(python: str, source: pathlib.Path, folder: pathlib.Path) -> int:
    """Converts a file and back; returns its number of tensors. Raises AssertionError where something differs."""
    checkpoint, output = folder / f"{source.name}.converted", folder / f"{source.name}.safetensors"
    command = [python, "-m", "av_mae.convert"]
    root = pathlib.Path(__file__).resolve().parent.parent
    subprocess.run(
        [*command, f"--source={source}", f"--output={checkpoint}", *OPTIONS],
        check=True,
        cwd=root,
        stdout=subprocess.DEVNULL,
    )
    subprocess.run(
        [*command, f"--source={checkpoint}", "--to=safetensors", f"--output={output}"],
        check=True,
        cwd=root,
        stdout=subprocess.DEVNULL,
    )
    before, after = load(source), load(output)
    assert sorted(before) == sorted(after)
    assert source.suffix != ".pth" or list(before) == list(after)
    for name, tensor in before.items():
        other = after[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) == bytes(
            other.reshape(-1).view(torch.uint8).numpy()
        ), name
    return len(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python", help="the Python that has av_mae")
    parser.add_argument("golden", type=pathlib.Path, help="folder of the golden files")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        sources = [*sorted(arguments.golden.glob("*.pth")), *sorted(arguments.golden.glob("*.safetensors"))]
        for source in sources + saved_by_torch(arguments.golden, folder):
            print(f"{source.name}: {there_and_back(arguments.python, source, folder)} tensors equal", flush=True)
    print(f"torch {torch.__version__}")


if __name__ == "__main__":
    main()
