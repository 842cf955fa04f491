"""`python tests/train_recorded.py FOLDER [FAULT:PROCESS:STEP] …`: av_mae.train that writes down which clips it takes.

FOLDER gets a file of each process with a JSON line [index, id] of each clip it takes. FAULT in one process, once it
takes the batch of STEP: `sleep` (the input never comes), `raise` (a programmer's error). A step takes at least PACE,
so that a test which stops the run at a step does so long before the run ends, on any machine.
"""

import json
import os
import pathlib
import time

from av_mae.errors import run_command
from av_mae.train import __main__ as train
from av_mae.train import run
from av_mae.train.loop import Prefetch

PACE = 0.05  # seconds


def recording(folder: pathlib.Path, fault: str, victim: int, at: int) -> type[Prefetch]:
    """Prefetch that records and fails as asked."""
    import jax

    class Recording(Prefetch):
        def __next__(self):
            host, batch = super().__next__()
            rows = len(host["id"])
            indices = sorted({index for shard in batch["index"].addressable_shards for index in shard.data.tolist()})
            assert len(indices) == rows
            with (folder / f"{jax.process_index()}-{os.getpid()}").open("a") as file:
                file.write("".join(json.dumps(pair) + "\n" for pair in zip(indices, host["id"].tolist())))
            step = indices[0] // batch["index"].shape[0] + 1
            if fault and jax.process_index() == victim and step == at:
                if fault == "raise":
                    raise RuntimeError("a programmer's error")
                time.sleep(1000)
            time.sleep(PACE)
            return host, batch

    return Recording


def main(argv: list[str]) -> None:
    folder = pathlib.Path(argv[0])
    folder.mkdir(exist_ok=True)
    fault, victim, at = argv[1].split(":") if len(argv) > 1 and argv[1].count(":") == 2 else ("", 0, 0)
    run.Prefetch = recording(folder, fault, int(victim), int(at))
    train.main(argv[2 if fault else 1 :])


if __name__ == "__main__":
    run_command(main)
