"""Opens every weight file in a folder and reads its tensors, in a process whose time and memory are measured.

    python tests/weight_file_process.py FOLDER

Prints JSON: `peak_mb` of the process, and for each file `seconds` of computing and `error` (None when it was read).
An error that is no UserError counts as a crash and ends the process.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

from av_mae.convert.weight_file import open_weights
from av_mae.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent


def open_and_read(path: pathlib.Path) -> str | None:
    try:
        for tensor in open_weights(path).tensors.values():
            tensor.read()
    except UserError as error:
        return str(error)


def peak_megabytes() -> float:
    """From Linux: `getrusage` would tell the peak of the process that started this one, if that is larger."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text()).group(1)) / 1024


def main(folder: pathlib.Path) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        start = time.process_time()
        error = open_and_read(path)
        files[path.name] = {"error": error, "seconds": time.process_time() - start}
    print(json.dumps({"files": files, "peak_mb": peak_megabytes()}))


def measure(folder: pathlib.Path, working_directory: pathlib.Path) -> tuple[dict[str, dict], float]:
    """Runs this script on a folder: (what it says about each file, its peak memory in MB)."""
    result = subprocess.run(
        [sys.executable, __file__, str(folder)],
        cwd=working_directory,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    answer = json.loads(result.stdout)
    return answer["files"], answer["peak_mb"]


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
