"""python make_expected.py FOLDER OUTPUT: what the code of this commit reads in FOLDER, as expected.npz and .json."""

import json
import pathlib
import sys

import numpy as np
import saved

if __name__ == "__main__":
    folder, output = map(pathlib.Path, sys.argv[1:])
    arrays, told = saved.read_all(folder)
    np.savez_compressed(output / "expected.npz", **arrays)
    (output / "expected.json").write_text(json.dumps(told, indent=1) + "\n")
