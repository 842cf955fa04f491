"""`benchmark input`: its metrics agree with one another, and its clips are like real ones."""

import functools
import io
import json

import fake_clips
import numpy as np
import pytest
import simplejpeg
import soundfile

from av_mae.benchmark import __main__ as benchmark
from av_mae.benchmark import input as reading
from av_mae.config import DataConfig
from av_mae.errors import UserError
from av_mae.media import decode as media
from av_mae.prepare.shards import write_set


def test_metrics_of_a_made_set(tmp_path, capsys):
    benchmark.main(["input", "--clips=2", "--rounds=1", f"--json={tmp_path / 'metrics.json'}"])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics["stages"]) == {"read", "jpeg", "crop", "sound", "log_mel", "batch"} and metrics["clips"] == 2
    rate, video = metrics["clips_per_second_per_core"], metrics["video_clips_per_second_per_core"]
    assert rate > video > 0 and metrics["times_video"] == pytest.approx(rate / video)
    seconds = metrics["seconds_per_clip"]
    assert sum(seconds[name] for name in (*metrics["stages"], "other")) == pytest.approx(1 / rate)
    assert metrics["stages"]["jpeg"] == pytest.approx(1 / seconds["jpeg"])
    # 3 × 36 GFLOP a clip at half of 197 TFLOP/s
    assert metrics["chips"]["v5e"]["clips_per_second"] == pytest.approx(0.5 * 197e12 / (3 * 36.0e9), rel=0.01)
    assert metrics["chips"]["H100"]["cores"] == pytest.approx(metrics["chips"]["H100"]["clips_per_second"] / rate)
    assert "| jpeg" in capsys.readouterr().out


def test_clips_that_cannot_be_read_are_left_out(tmp_path):
    """A set without a training split, of small clips with one frame each; of three one is damaged."""
    clips = [fake_clips.record("c", index, size=(33, 47), seconds=1.0, frames=1) for index in range(3)]
    clips[1]["sound"] = clips[1]["sound"][:300]
    clips = [{name: value for name, value in clip.items() if name != "label"} for clip in clips]
    for folder, chosen in (("some", clips), ("none", clips[1:2])):
        (tmp_path / folder).mkdir()
        splits = {"valid": functools.partial(iter, chosen)}
        write_set(tmp_path / folder, "made_up", "made up", ["x"], splits, len(chosen))
    assert reading.measure(str(tmp_path / "some"), 64, 1)["clips"] == 2
    with pytest.raises(UserError, match="none of the first 1 clips of .*none can be read; .*clip c-1: sound: "):
        reading.measure(str(tmp_path / "none"), 64, 1)


def test_made_clips_are_like_real_ones(tmp_path):
    """Sizes of real clips at these settings: frames 13 to 39 kB, sounds 100 to 200 kB. The video shows the same."""
    clip = reading.compose(3)
    sizes = [len(frame) for frame in clip["frames"]]
    waveform, rate = soundfile.read(io.BytesIO(clip["sound"]))
    assert len(sizes) == 10 and 13e3 < np.mean(sizes) < 39e3 and 100e3 < len(clip["sound"]) < 200e3
    assert (len(waveform), rate) == (160_000, 16_000) and 0.01 < np.abs(waveform).max() < 1
    assert reading.write_video(clip, tmp_path / "clip.mp4") == 10.0
    video = media.Media(tmp_path / "clip.mp4")
    (_, frame), (_, between) = video.frames([4.0, 6.52])
    stills = [simplejpeg.decode_jpeg(clip["frames"][number]).astype(float) for number in (4, 6, 7)]
    assert np.abs(frame - stills[0]).mean() < 6
    assert np.abs(between - (0.48 * stills[1] + 0.52 * stills[2])).mean() < 6
    assert np.abs(frame - stills[1]).mean() > 12
    heard, rate, began = video.waveform(2.0, 3.0)
    expected = np.interp(began + np.arange(len(heard)) / rate, np.arange(160_000) / 16_000, waveform)
    assert np.corrcoef(heard, expected)[0, 1] > 0.95


def test_waiting_grows_with_the_device(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "WAIT_SECONDS", 0.5)
    folder = reading._make_set(tmp_path / "set", 2)
    slow, fast = (reading.wait_share(DataConfig(path=folder), rate, 0) for rate in (20, 1e6))
    assert 0 <= slow < 0.9 < fast < 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--clips=0"], "--clips=0 must be at least 1"),
        (["--device_rate=-1"], "--device_rate=-1.0 must be at least 0"),
        (["--workers=-1"], "--workers=-1 must be at least 0"),
        (["--data=no/such"], "no/such does not exist"),
        (["--data=one,other"], "--data=one,other must name one prepared set"),
        (["--rounds=0"], "--rounds=0"),
        (["--config.data.path=x"], "takes no --config.data.path"),
    ],
)
def test_bad_options_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        benchmark.main(["input", *arguments])
