"""What PyTorch makes of weight files. Run by hand with a Python that has torch 2.13.0, omegaconf and numpy.

    python tests/compare_with_torch.py verdicts   # torch.load(weights_only=True) on every hostile and every good file
    python tests/compare_with_torch.py good       # makes the good files and what torch reads from them

Files go to tests/data; each hostile file is loaded in a process of its own with limits, in a temporary folder.
"""

import argparse
import collections
import hashlib
import json
import os
import pathlib
import pickle
import resource
import signal
import sys
import tempfile
import warnings
import zipfile

import hostile_files
import numpy as np
import omegaconf
import torch
import weight_file_bytes

DATA = pathlib.Path(__file__).resolve().parent / "data"
GOOD, VERDICTS = DATA / "torch_files", DATA / "torch_verdicts.json"
SECONDS, BYTES = 60, 2**33
DTYPES = ("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")
WIDE_UNSIGNED = ("uint16", "uint32", "uint64")


def values(shape: tuple[int, ...], dtype: str = "float32") -> torch.Tensor:
    return (torch.randn(shape) * 50).abs().to(getattr(torch, dtype))


def state_dict(dtypes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Every type, and every way for a tensor to lie in its storage."""
    torch.manual_seed(0)
    whole = values((6, 5))
    return collections.OrderedDict(
        **{f"of.{dtype}": values((3, 4), dtype) for dtype in dtypes},
        **{f"strided.{dtype}": values((7, 6), dtype)[1::2, ::3].T for dtype in dtypes},
        scalar=values(()),
        empty=torch.empty(0),
        empty_rows=torch.empty(3, 0, 2)[:, :, 1:],
        whole=whole,
        row=whole[2],
        column=whole[:, 3],
        transposed=whole.T,
        reordered=values((2, 3, 4)).permute(2, 0, 1),
        same=whole,
        expanded=values((3, 1)).expand(3, 4),
        one=values((1, 8))[:, 2:3],
        last=whole.view(-1)[29:],
        channels_last=values((2, 3, 4, 5)).to(memory_format=torch.channels_last),
        parameter=torch.nn.Parameter(values((4,))),
        frozen=torch.nn.Parameter(values((2, 2)), requires_grad=False),
    )


def checkpoint(prefix: str) -> dict:
    """As training programs save it: model, optimizer, loss scaler, numbers and the settings of the run."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    state = model.state_dict(prefix=prefix)
    args = argparse.Namespace(
        lr=1e-3,
        layers=[1, 2],
        betas=(0.9, 0.95),
        output=pathlib.PurePosixPath("runs/a"),
        device=torch.device("cpu"),
        dtype=torch.float32,
        kind=torch.optim.AdamW,
        nothing=None,
    )
    config = omegaconf.OmegaConf.create({"model": {"width": 48, "layers": [1, 2]}, "lr": 1e-3, "name": "a"})
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 7}
    return {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "scaler": scaler,
        "epoch": 3,
        "args": args,
        "n_steps": torch.tensor(12),
        "name": "small",
        "loss": 0.25,
        "config": config,
        "best": np.float64(0.5),
        "history": np.arange(3.0),
        "kinds": {1, 2},
        "counts": collections.defaultdict(list, a=[1]),
    }


def swap_bytes(little: pathlib.Path, big: pathlib.Path, state: dict[str, torch.Tensor]) -> None:
    """Writes the zip file of a state dict again, as a big-endian machine would."""
    widths = {}  # bytes of an element by storage; torch.save numbers storages in the order of their first tensors
    for tensor in state.values():
        widths.setdefault(tensor.untyped_storage()._cdata, tensor.element_size())
    widths = dict(enumerate(widths.values()))
    with zipfile.ZipFile(little) as source, zipfile.ZipFile(big, "w") as target:
        for name in source.namelist():
            data, (folder, key) = source.read(name), name.rsplit("/", 2)[-2:]
            if folder == "data":
                data = np.frombuffer(data, f">u{widths[int(key)]}").astype(f"<u{widths[int(key)]}").tobytes()
            target.writestr(name, b"big" if key == "byteorder" else data)


def save_expected(path: pathlib.Path, state: dict[str, torch.Tensor]) -> None:
    """What torch reads, as arrays; bfloat16 as float32, which holds it exactly. `dtype/NAME` says the type."""
    arrays = {}
    for name, tensor in state.items():
        name, tensor = name.removeprefix("module."), tensor.detach()
        arrays[f"dtype/{name}"] = str(tensor.dtype).removeprefix("torch.")
        arrays[name] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    np.savez_compressed(path, **arrays)


def make_good() -> None:
    """The good files, and what torch reads from them as an .npz by the first word of their names."""
    GOOD.mkdir(parents=True, exist_ok=True)
    types = state_dict(DTYPES)
    torch.save(types, GOOD / "types_zip.pt")
    torch.save(types, GOOD / "types_legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(types, GOOD / "types_protocol_4.pt", pickle_protocol=4)
    torch.save(state_dict(WIDE_UNSIGNED), GOOD / "unsigned_zip.pt")
    swap_bytes(GOOD / "types_zip.pt", GOOD / "types_big_endian.pt", types)
    torch.save(checkpoint("module."), GOOD / "checkpoint_zip.pt")
    torch.save(checkpoint(""), GOOD / "checkpoint_legacy.pt", _use_new_zipfile_serialization=False)
    for path in sorted(GOOD.glob("*.pt")):
        loaded = torch.load(path, weights_only=False)  # made a moment ago, right here
        save_expected(GOOD / f"{path.stem.partition('_')[0]}.npz", loaded.get("model", loaded))
        print(f"{path.name}: {path.stat().st_size} bytes")


def verdict(path: pathlib.Path) -> str:
    """'accepted', 'unsafe: …' (what the restricted unpickler refuses) or 'damaged: …' (any other error)."""
    try:
        torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        kind, message = "unsafe", str(error)
    except BaseException as error:
        kind, message = "damaged", f"{type(error).__name__}: {error}"
    else:
        return "accepted"
    cause = message.split("WeightsUnpickler error:")[-1].split("trusted source.")[-1]
    return f"{kind}: {' '.join(cause.replace(str(path.parent), '').split())[:120]}"


def isolated_verdict(path: pathlib.Path) -> str:
    """The verdict of a child process, which may crash or be stopped at the limits."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        signal.alarm(SECONDS)
        os.write(write, verdict(path).encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        answer = pipe.read().decode()
    status = os.waitpid(child, 0)[1]
    return answer if status == 0 else f"damaged: PyTorch ends by signal {status & 127}"


def record_verdicts() -> None:
    """Writes the verdicts by file, each with the digest of the file that it is about."""
    warnings.simplefilter("ignore")
    verdicts = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        made = hostile_files.hostile_files() | weight_file_bytes.good_files()
        paths = hostile_files.write_files(made, pathlib.Path(folder) / "files")
        for path in [*paths, *sorted(GOOD.glob("*.pt"))]:
            if path.suffix == ".pt":
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                verdicts[path.name] = {"sha256": digest, "verdict": isolated_verdict(path)}
        if os.path.exists(hostile_files.CANARY):
            sys.exit("a payload was executed by PyTorch")
    VERDICTS.write_text(json.dumps({"torch": torch.__version__, "files": verdicts}, indent=1) + "\n")
    kinds = collections.Counter(entry["verdict"].partition(":")[0] for entry in verdicts.values())
    print(f"torch {torch.__version__}: {dict(kinds)}")


if __name__ == "__main__":
    commands = {"good": make_good, "verdicts": record_verdicts}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit(f"usage: python tests/compare_with_torch.py {'|'.join(commands)}")
    commands[sys.argv[1]]()
