"""Options and fixtures of all tests. Eight CPU devices stand in for a pod (child processes see one).

XLA compiles without its expensive passes, here and in child processes: the tests run four times sooner. What one test
compiled is read back by the next that needs the same program, within one run of pytest.
"""

import os
import pathlib
import random
import secrets
import shutil
import tempfile

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads only wait for one another where tests share cores
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # xdist's workers get the first process's
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED = tempfile.mkdtemp(prefix="av_mae-compiled-")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
else:
    COMPILED = None

import jax
import jaxtyping
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Shapes in signatures of models/ are checked whenever a test calls or traces one. Configurations check their values
# themselves, with messages for users, and what is in kinds.py also takes shapes without values. NumPy arrays may stand
# for JAX arrays, as in calls of users.
jaxtyping.Array = jax.Array | np.ndarray
jaxtyping.install_import_hook(
    [
        f"av_mae.models.{file.stem}"
        for file in sorted((ROOT / "av_mae" / "models").glob("*.py"))
        if file.stem not in ("__init__", "config", "kinds")
    ],
    "beartype.beartype",
)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", default=False, help="also run tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes rather than seconds; runs with --slow")


def pytest_unconfigure(config):
    if COMPILED is not None:
        shutil.rmtree(COMPILED, ignore_errors=True)


# The longest files, begun first: a long one at the end would keep one process at work while the others wait.
LONGEST = """test_survive test_resume test_slurm test_prepare_engines test_prepare_beam test_ssh test_stores test_stack
    test_task test_readme test_colabs test_plain test_compiled test_compare test_sharding test_golden""".split()


def pytest_collection_modifyitems(config, items):
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random faults come from a seed that a failed test shows; AV_MAE_TEST_SEED repeats them."""
    seed = int(os.environ.get("AV_MAE_TEST_SEED") or secrets.randbelow(2**32))
    print(f"seed {seed}: AV_MAE_TEST_SEED={seed} draws the same")
    random.seed(seed)


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
    """The repository's root."""
    return ROOT


@pytest.fixture
def ascii_locale(root) -> dict[str, str]:
    """The environment of a command in a locale without UTF-8, not even by the mode that Python then takes by itself."""
    return {**os.environ, "PYTHONPATH": str(root), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder beside the repository with golden tensors and real media."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"{folder} with golden tensors and real media is not here")
    return folder
