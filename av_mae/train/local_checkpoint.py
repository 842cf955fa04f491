"""Fast checkpoints on each host's own disk, between those of the shared store: `<folder>/<run>/<step>/`.

Every process writes the parts of the state that lie on its own devices into a file of its own, without talking to the
others. They serve the same processes on the same mesh, after a crash that left the disks; anything else goes on from
the shared store.
"""

import contextlib
import functools
import json
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from av_mae import recipes
from av_mae.checkpoint import Restored, TrainState, check_same_run, flat_optimizer, unflat_state
from av_mae.config import TrainConfig
from av_mae.console import first_line, note
from av_mae.train.sharding import gather_values
from av_mae.workdir import push

KEPT = 2


def span(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """A part of an array as text: '0:4,0:16'."""
    return ",".join("{}:{}".format(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


def flat_state(state: TrainState) -> dict[str, Any]:
    """Model and optimizer by dotted name."""
    return {f"model.{name}": x for name, x in state.model.items()} | {
        f"optimizer.{name}": x for name, x in flat_optimizer(state).items()
    }


def own_parts(state: TrainState) -> Iterator[tuple[str, Any]]:
    """(name@part, array) of what lies on this process' devices, each part once."""
    for name, x in flat_state(state).items():
        parts = {span(shard.index, x.shape): shard.data for shard in x.addressable_shards}
        yield from ((f"{name}@{part}", data) for part, data in parts.items())


class LocalCheckpoints:
    """The fast checkpoints of one run, named by `run`. Every process makes the same calls.

    A save that fails is reported, and the shared store's checkpoints are what counts.
    """

    def __init__(self, folder: pathlib.Path, run: str, say: Callable[[str], None] = note):
        self.folder, self.say = folder / run, say
        self._writer: threading.Thread | None = None

    def _path(self, step: int) -> pathlib.Path:
        return self.folder / str(step) / f"{jax.process_index()}.npz"

    def steps(self) -> list[int]:
        """Steps of which this process has its part, ascending."""
        return sorted(int(path.parent.name) for path in self.folder.glob(f"*/{jax.process_index()}.npz"))

    def save(self, step: int, state: TrainState, config: TrainConfig, **position: int) -> None:
        """Copies this process' part of the state and writes it in the background."""
        self.wait()
        parts = list(own_parts(state))
        for _, data in parts:
            data.copy_to_host_async()
        arrays = {name: np.array(data) for name, data in parts}  # copies: the next step writes into the state
        meta = {"step": step, "seed": config.seed, "config": recipes.to_dict(config), **position}
        self._writer = threading.Thread(target=self._write, args=(step, arrays, meta), name="local checkpoint")
        self._writer.start()

    def _write(self, step: int, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        path = self._path(step)
        temporary = path.with_suffix(".tmp")
        push()  # as before those on a store: the lines of metrics up to this step
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                np.savez(file, **{"meta": np.array(json.dumps(meta)), **arrays})  # type: ignore[arg-type]  # of no array
            os.replace(temporary, path)
            for old in self.steps()[:-KEPT]:
                self._path(old).unlink()
                with contextlib.suppress(OSError):  # other processes of this host have theirs there
                    self._path(old).parent.rmdir()
        except OSError as error:
            temporary.unlink(missing_ok=True)
            self.say(f"warning: local checkpoint {step} could not be saved ({first_line(error)}); training goes on")

    def wait(self) -> None:
        """Waits until the last save is finished."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    close = wait

    def restore(self, abstract: TrainState, config: TrainConfig, after: int) -> Restored | None:
        """The newest one later than step `after` of which every process can read its part, else None.

        Those that not all have are deleted.

        Raises:
          UserError: it is of another model or seed.
        """
        steps = {step for step in self.steps() if step > after}
        for step in sorted(steps.intersection(*gather_values([sorted(steps)])), reverse=True):
            found = self._read(step, abstract)
            if all(gather_values([found is not None])) and found is not None:
                check_same_run(found.meta["config"], config)
                self._drop(step)
                return found
            self.say(f"warning: local checkpoint {step} is damaged, or of another mesh; going back to the one before")
        self._drop(after)
        return None

    def _drop(self, newest: int) -> None:
        for step in self.steps():
            if step > newest:
                shutil.rmtree(self._path(step).parent, ignore_errors=True)

    def _read(self, step: int, abstract: TrainState) -> Restored | None:
        """This process' part as global arrays; `None` where it is damaged or does not fit the mesh."""
        try:
            with np.load(self._path(step)) as file:
                meta = json.loads(str(file["meta"]))
                arrays = {name: file[name] for name in file.files}  # reading them checks their CRCs
            flat = flat_state(abstract)

            def part(name: str, index: tuple[slice, ...]) -> Any:
                return arrays[f"{name}@{span(index, flat[name].shape)}"]

            made = {
                name: jax.make_array_from_callback(x.shape, x.sharding, functools.partial(part, name))
                for name, x in flat.items()
            }
            if any(made[name].dtype != x.dtype for name, x in flat.items()):
                return None
        except Exception:  # damage shows in many ways
            return None
        parts = ("model", abstract.model), ("optimizer", flat_optimizer(abstract))
        model, optimizer = ({name: made[f"{kind}.{name}"] for name in part} for kind, part in parts)
        return Restored(unflat_state(abstract, meta["step"], model, optimizer), meta)
