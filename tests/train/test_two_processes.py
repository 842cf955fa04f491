"""The same command started twice on one work directory: one leaves with a line, the other's run is whole.

AV_MAE_TWO_PROCESSES=20 starts so many pairs (3 without it), the second of each after a random time.
"""

import os
import random
import re
import signal
import time

import pytest
from train_processes import Training

from av_mae import loading
from av_mae.errors import RESTART
from av_mae.lock import LOCK

PAIRS = int(os.environ.get("AV_MAE_TWO_PROCESSES", "3"))
LATEST = 8.0  # seconds after the first: from its start, through its compilation, to its steps
ENDLESS = [
    f"--stopped_status={RESTART}",
    "--config.data.workers=0",
    "--config.steps=100000",
    "--config.checkpoint_every=10",
]


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    return Training(tmp_path_factory.mktemp("two"))


@pytest.mark.slow
@pytest.mark.parametrize("pair", range(PAIRS))
def test_of_two_processes_one_trains(training, pair):
    name, late = f"run{pair}", random.uniform(0, LATEST)
    print(f"the second starts {late:.3f} s after the first")
    processes = [training.start(name, *ENDLESS)]
    time.sleep(late)
    processes.append(training.start(name, *ENDLESS))
    try:
        until = time.monotonic() + 240
        while all(process.poll() is None for process in processes) and time.monotonic() < until:
            time.sleep(0.05)
        refused, holder = sorted(processes, key=lambda process: process.poll() is None)
        said = refused.communicate(timeout=10)[1]
        assert refused.returncode == 2 and len(said.splitlines()) == 1, said
        assert re.fullmatch(rf"error: \S+{name} is held by process {holder.pid} on \S+ since 20.*\n", said)
        training.wait_for_step(name, 12, holder)
        holder.send_signal(signal.SIGTERM)
        assert holder.wait(timeout=120) == RESTART, holder.communicate()[1]
    finally:
        for process in processes:
            process.kill()
    folder = training.folder / name
    steps = [line["step"] for line in training.metrics(name) if "loss" in line]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 12
    kept = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())
    assert kept[-1] == steps[-1] and len(kept) <= 3
    for step in kept:
        loading.load(folder / "checkpoints" / str(step))  # compares the digests of meta and arrays
    assert not (folder / LOCK).exists()
