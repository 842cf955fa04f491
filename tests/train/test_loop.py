"""The loop and its hooks with a step that only counts: order, metrics, failures, stopping, full disks."""

import errno
import io
import json
import math
import os
import resource
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from fake_training import FakePrefetch, Recorder, counting_step, never
from tensorboardX.proto import event_pb2
from tiny_training import recipe

from av_mae.console import Progress
from av_mae.errors import FailureCount, UserError
from av_mae.train import hooks, loop
from av_mae.train.hooks import Events
from av_mae.workdir import SkippedFile, read_skipped


def test_metrics_come_once_in_order_and_before_the_state():
    recorder = Recorder()
    assert loop.train(counting_step(), 0, FakePrefetch(), 0, 7, [recorder], never) == 7
    assert recorder.seen == [
        ("metrics", 1),
        ("metrics", 2),
        ("metrics", 3),
        ("state", 3, 3, False, False),
        ("metrics", 4),
        ("metrics", 5),
        ("metrics", 6),
        ("state", 6, 6, False, False),
        ("metrics", 7),
        ("state", 7, 7, True, False),
    ]


def test_goes_on_from_a_step():
    recorder = Recorder(every=100)
    loop.train(counting_step(), 4, FakePrefetch(4), 4, 6, [recorder], never)
    assert recorder.seen == [("metrics", 5), ("metrics", 6), ("state", 6, 6, True, False)]


def test_stops_after_the_step_and_says_so():
    recorder = Recorder(every=100)
    state = loop.train(counting_step(), 0, FakePrefetch(), 0, 50, [recorder], lambda step: step == 5)
    assert state == 5 and recorder.seen[-1] == ("state", 5, 5, False, True)
    assert [entry[1] for entry in recorder.seen[:-1]] == [1, 2, 3, 4, 5]


def test_non_finite_loss_names_step_and_clips_and_nothing_later_is_saved():
    recorder = Recorder(every=4)
    with pytest.raises(UserError) as caught:
        loop.train(counting_step(bad=(7,)), 0, FakePrefetch(), 0, 50, [recorder], never)
    message = str(caught.value)
    assert message.startswith("step 7: loss=nan must be finite; the run stops and keeps its last checkpoint")
    assert "step7-0, step7-1" in message and "step8" not in message
    assert [entry[1] for entry in recorder.seen if entry[0] == "state"] == [4]


def test_non_finite_loss_at_a_checkpoint_is_seen_before_saving():
    recorder = Recorder(every=4)
    with pytest.raises(UserError, match="step 4: loss=nan"):
        loop.train(counting_step(bad=(4,)), 0, FakePrefetch(), 0, 50, [recorder], never)
    assert not [entry for entry in recorder.seen if entry[0] == "state"]


@pytest.mark.parametrize("name", ["loss", "image_loss", "audio_loss", "grad_norm"])
def test_every_kind_of_non_finite_value_is_noticed(name):
    metrics = dict.fromkeys(("loss", "image_loss", "audio_loss", "grad_norm"), 1.0)
    loop.check_finite(3, metrics, ["a"])
    with pytest.raises(UserError, match=f"step 3: {name}=inf must be finite.*Clips of the batch: a"):
        loop.check_finite(3, {**metrics, name: math.inf}, ["a"])


def test_sigterm_is_noticed_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with loop.stop_on_sigterm() as should_stop:
        assert not should_stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert should_stop(2)
    assert signal.getsignal(signal.SIGTERM) == before


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics_run(workdir, first, last, **changes):
    """Runs the counting step with the metrics hook."""
    config = recipe(log_every=2, **changes)
    progress = Progress(last, "test", "steps", initial=first, stream=io.StringIO())
    prefetch = FakePrefetch(first)
    events = Events(workdir, first)
    hook = hooks.MetricsHook(
        config,
        workdir,
        events,
        progress=progress,
        prefetch=prefetch,
        last=last,
        resumed=first,
        skipped=first,
        flops=3e6,
    )
    with progress:
        loop.train(counting_step(), first, prefetch, first, last, [hook], never)
    events.close()
    return progress


def test_metrics_lines(tmp_path):
    metrics_run(tmp_path, 0, 5)
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert lines[1]["loss"] == 0.25 and lines[1]["skipped"] == 4  # one clip of each step is not valid
    assert {
        "image_loss",
        "audio_loss",
        "grad_norm",
        "learning_rate",
        "clips_per_second",
        "input_wait",
        "flops_per_second",
    } <= set(lines[1])
    assert lines[1]["input_wait"] == 0 and lines[1]["clips_per_second"] > 0 and "valid" not in lines[1]
    assert lines[1]["flops_per_second"] == 3e6 * lines[1]["clips_per_second"]


def test_lines_after_the_restored_step_are_dropped(tmp_path):
    """Killed at step 7 with a line cut off, resumed from step 4: the file is that of an uninterrupted run."""
    metrics_run(tmp_path, 0, 10)
    whole = read_lines(tmp_path / "metrics.jsonl")
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in whole[:3]) + '{"step": 8, "los')
    metrics_run(tmp_path, 4, 10)
    timing = ("clips_per_second", "input_wait", "flops_per_second")
    plain = [
        [{name: x for name, x in line.items() if name not in timing} for line in lines]
        for lines in (whole, read_lines(path))
    ]
    assert plain[0] == plain[1]


def read_events(folder):
    """Events of all files: (length, crc, data, crc) records."""
    events = []
    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def test_tensorboard_events(tmp_path):
    events = Events(tmp_path, 4)
    events.scalars(6, {"loss": 0.5, "grad_norm": 2.0})
    events.image(6, "reconstructions", np.zeros((5, 7, 3), np.uint8))
    events.close()
    first, start, scalars, picture = read_events(tmp_path)
    assert first.file_version == "brain.Event:2" and start.step == 5 and start.session_log.status == 1
    assert {value.tag: value.simple_value for value in scalars.summary.value} == {"loss": 0.5, "grad_norm": 2.0}
    image = picture.summary.value[0].image
    assert (image.height, image.width) == (5, 7) and image.encoded_image_string.startswith(b"\x89PNG")


def test_full_disk_keeps_lines_for_later(tmp_path):
    """The file may not grow beyond a part of the second line; that part is taken back."""
    file = hooks.MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write({"step": 1})
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.path.stat().st_size + 5, before[1]))
    try:
        with pytest.raises(OSError):
            file.write({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}]
    file.write({"step": 3})
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_metrics_are_not_written_through_a_link(tmp_path):
    (tmp_path / "profile").write_text("kept")
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "profile")
    hooks.MetricsFile(tmp_path / "metrics.jsonl", 0).write({"step": 1})
    assert (tmp_path / "profile").read_text() == "kept"
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_full_disk_is_one_warning_and_the_run_goes_on(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hooks.MetricsFile, "write", fail)
    progress = metrics_run(tmp_path, 0, 8)
    shown = progress._stream.getvalue()
    assert shown.count("warning: metrics cannot be written (No space left on device); training goes on") == 1


def test_failed_clips_are_named_and_too_many_stop_the_run(tmp_path):
    said = []
    hook = hooks.FailureHook(FailureCount(0.5, minimum=4), SkippedFile(tmp_path), said.append)
    ids = np.array(["a", "b", "c", "d"], object)
    host = {
        "id": ids,
        "stage": np.array(["sound", "", "", ""], object),
        "cause": np.array(["torn", "", "", ""], object),
    }
    for _ in range(2):
        hook.after_metrics(3, {}, host)
    assert said == ["warning: step 3 skips clip a: sound: torn"] * 2
    with pytest.raises(UserError, match=r"10 of 16 clips failed .*8 × frame: gone: away"):
        for _ in range(2):
            host = {"id": ids, "stage": np.array(["frame"] * 4, object), "cause": np.array(["gone: away"] * 4, object)}
            hook.after_metrics(4, {}, host)
    hook.close()
    assert "10 of 16 clips failed" in said[-1]
    expected = [("a", "sound", "torn"), *((clip, "frame", "gone: away") for clip in "abcd")]
    assert [failure.args for failure in read_skipped(tmp_path)] == expected


def test_profile_is_taken_once(tmp_path, monkeypatch):
    calls, said = [], []
    monkeypatch.setattr(hooks.jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(hooks.jax.profiler, "stop_trace", lambda: calls.append("stop"))
    hook = hooks.ProfileHook(4, tmp_path, said.append)
    due = []
    original = hook.due
    monkeypatch.setattr(hook, "due", lambda *moment: due.append(moment[0]) is None and original(*moment))
    loop.train(counting_step(), 0, FakePrefetch(), 0, 20, [hook], never)
    hook.close()
    assert calls == ["start", "stop"] and "steps 5 to 7" in said[0]


def test_position_counts_clips_since_the_resumed_one():
    """Also where the batch size was another one before."""
    saved = []
    checkpoints = SimpleNamespace(save=lambda step, state, config, **meta: saved.append((step, meta)))
    hook = hooks.CheckpointHook(recipe(checkpoint_every=2), checkpoints, SimpleNamespace(skipped=3), 4, 800)
    loop.train(counting_step(), 4, FakePrefetch(4), 4, 7, [hook], never)
    assert saved == [(6, {"position": 832, "skipped": 3}), (7, {"position": 848, "skipped": 3})]


def test_profile_on_a_full_disk_is_a_warning(tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("RESOURCE_EXHAUSTED: vm.xplane.pb; No space left on device")

    said = []
    monkeypatch.setattr(hooks.jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(hooks.jax.profiler, "stop_trace", fail)
    assert (
        loop.train(counting_step(), 0, FakePrefetch(), 0, 9, [hooks.ProfileHook(4, tmp_path, said.append)], never) == 9
    )
    assert len(said) == 1 and "the profile cannot be written" in said[0] and "no space left" in said[0]
