"""`python -m av_mae.benchmark.neighbours`: nearest neighbours among random embeddings, beside scikit-learn's.

Memory is that of the whole process: its size just before the search, embeddings included, and the most that it grew by
until the search was done.
"""

import argparse
import json
import pathlib
import resource
import time

import numpy as np

from av_mae.benchmark import timing
from av_mae.errors import UserError, run_command
from av_mae.evaluate import nearest as neighbours


def resident_bytes() -> int:
    """Memory of this process now (Linux)."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(clips: int, width: int, part: int, block: int) -> dict:
    """Seconds and memory of the leave-one-out search; scikit-learn's brute force searches for the first `part` clips.

    Raises UserError where scikit-learn is not installed.
    """
    embeddings = np.random.default_rng(0).standard_normal((clips, width), np.float32)
    before = resident_bytes()
    start = time.perf_counter()
    found = neighbours.nearest({"embeddings": embeddings}, block)["embeddings"]
    seconds = time.perf_counter() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    search = brute_force(embeddings)
    start = time.perf_counter()
    index = search.kneighbors(embeddings[:part], return_distance=False)
    brute_seconds = (time.perf_counter() - start) * clips / part
    others = np.where(index[:, 0] == np.arange(part), index[:, 1], index[:, 0])
    return {
        "clips": clips,
        "width": width,
        "seconds": seconds,
        "embeddings_bytes": embeddings.nbytes,
        "before_bytes": before,
        "grown_bytes": grown,
        "scikit_learn_clips": part,
        "scikit_learn_extrapolated_seconds": brute_seconds,
        "agreement_share": float(np.mean(others == found.index[:part])),
    }


def brute_force(embeddings: np.ndarray):
    """scikit-learn's search for a clip and its nearest neighbour."""
    try:
        from sklearn.neighbors import NearestNeighbors
    except ImportError as error:
        raise UserError("the comparison needs scikit-learn: pip install scikit-learn") from error
    return NearestNeighbors(n_neighbors=2, metric="cosine", algorithm="brute").fit(embeddings)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.benchmark.neighbours",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--clips", type=int, default=200_000, help="embeddings (default: 200000)")
    parser.add_argument("--width", type=int, default=768, help="values of each (default: 768)")
    parser.add_argument("--part", type=int, default=4096, help="clips that scikit-learn searches for (default: 4096)")
    parser.add_argument("--block", type=int, default=neighbours.BLOCK, help="rows compared at a time (default: 4096)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")
    arguments = parser.parse_args(argv)
    if not 2 <= arguments.part <= arguments.clips or min(arguments.width, arguments.block) < 1:
        raise UserError(
            f"--part={arguments.part} must be at least 2, at most --clips={arguments.clips}, --width and "
            "--block at least 1"
        )
    figures = measure(arguments.clips, arguments.width, arguments.part, arguments.block)
    print(timing.table([("figure", "value"), *((name, f"{value:,.6g}") for name, value in figures.items())]))
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
