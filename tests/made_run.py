"""A run's folder, made without training: metrics, images, sounds, results and skipped clips, some of them hostile."""

import json

import numpy as np
import soundfile

from av_mae import plots

HOSTILE = "<script>alert('x')</script>&\"$\\frac{"


def write_run(folder, steps=3):
    """A run with metrics, reconstructions, a heat map, separated sounds and results, some of them hostile."""
    (folder / "images" / "separation").mkdir(parents=True)
    lines = [json.dumps({"step": 10 * n, "loss": 1 / (n + 1), HOSTILE: n, "seen": True}) for n in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, "[1, 2]", '{"step": 40, "lo']))
    (folder / "config.json").write_text(json.dumps({"steps": 30, "data": {"path": HOSTILE}}))
    for n in range(1, steps + 1):
        plots.save_png(folder / "images" / f"step_{10 * n:08d}.png", np.full((4, 6, 3), n, np.uint8))
    plots.save_png(folder / "images" / "localization.png", np.zeros((5, 5, 3), np.uint8))
    for kind in ("mixture", "estimate", "source"):
        soundfile.write(folder / "images" / "separation" / f"clip 1#_{kind}.wav", np.zeros(800), 8000)
    metrics = {
        "sdr": {"value": 7.1663, "low": 6.3041, "high": 8.0312, "left_out": {"silent": 2}},
        "swapped/sdr": {"value": None, "low": None, "high": None, "left_out": {"nothing left": 9}},
        HOSTILE: {"value": 1, "low": 0, "high": 2},
    }
    (folder / "results.json").write_text(json.dumps(metrics | {"clips": 20, "skipped": 1, "skipped_clips": [HOSTILE]}))
    causes = [{"clip": f"{HOSTILE}{n}", "stage": "frame", "cause": "broken"} for n in range(3)]
    causes.append({"clip": "silent", "stage": "sound", "cause": HOSTILE})
    (folder / "skipped.jsonl").write_text("".join(json.dumps(cause) + "\n" for cause in causes))
    return folder
