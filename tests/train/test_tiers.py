"""Local checkpoints, bad updates, failed saves, and where a run's time goes."""

import dataclasses
import json
import math
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from fake_training import CONFIG, FakePrefetch, Recorder, abstract, assert_same, counting_step, never, state_on
from tiny_training import batches, make_step, recipe, run_steps, unfused

from av_mae import recipes
from av_mae.benchmark import __main__ as benchmark
from av_mae.benchmark import parts
from av_mae.checkpoint import Checkpoints
from av_mae.errors import UserError
from av_mae.train import goodput, hooks, local_checkpoint, loop, run
from av_mae.train.local_checkpoint import LocalCheckpoints
from av_mae.train.step import TrainStep


@pytest.fixture
def said():
    return []


@pytest.fixture
def local(tmp_path, said):
    return LocalCheckpoints(tmp_path / "local", "run", said.append)


def save(checkpoints, *steps, data=1, fsdp=1):
    for step in steps:
        checkpoints.save(step, state_on(step, data, fsdp), CONFIG, position=16 * step)
        checkpoints.wait()


@pytest.mark.parametrize("data, fsdp", [(1, 1), (2, 4), (8, 1)])
def test_local_state_comes_back_in_its_shards(local, data, fsdp):
    save(local, 3, 5, data=data, fsdp=fsdp)
    back = local.restore(abstract(data, fsdp), CONFIG, after=4)
    assert_same(back, 5)
    for x, expected in zip(jax.tree.leaves(back.state), jax.tree.leaves(abstract(data, fsdp)), strict=True):
        assert x.sharding.is_equivalent_to(expected.sharding, x.ndim)


def test_local_keeps_two_and_only_later_ones_count(local):
    save(local, 1, 2, 3)
    assert local.steps() == [2, 3]
    assert local.restore(abstract(), CONFIG, after=3) is None


def test_local_save_is_not_disturbed_by_the_next_step(local):
    state = state_on(1)
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)
    local.save(1, state, CONFIG, position=16)
    for _ in range(5):
        state = overwrite(state)
    local.wait()
    assert_same(local.restore(abstract(), CONFIG, 0), 1)


def test_damaged_local_falls_back(local, said):
    save(local, 1, 2)
    path = local._path(2)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    path.write_bytes(content)
    assert_same(local.restore(abstract(), CONFIG, 0), 1)
    assert "local checkpoint 2 is damaged" in said[-1] and local.steps() == [1]


def test_local_of_another_mesh_is_passed_over(local, said):
    save(local, 1, data=2, fsdp=4)
    assert local.restore(abstract(4, 2), CONFIG, 0) is None
    assert "of another mesh" in said[-1] and local.steps() == []


def test_local_of_a_process_that_others_lack(local, monkeypatch):
    """This process has steps 4 and 6, the other one 4 only."""
    save(local, 4, 6)
    monkeypatch.setattr(
        local_checkpoint, "gather_values", lambda values: [*values, [4] if isinstance(values[0], list) else values[0]]
    )
    assert_same(local.restore(abstract(), CONFIG, 0), 4)
    assert local.steps() == [4]


def test_local_of_another_recipe_is_refused(local):
    save(local, 1)
    with pytest.raises(UserError, match="seed is 0 in it and 7 now"):
        local.restore(abstract(), dataclasses.replace(CONFIG, seed=7), 0)


def test_full_local_disk_is_a_warning(local, said, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    save(local, 1)
    assert said == ["warning: local checkpoint 1 could not be saved (no space left on device); training goes on"]
    assert local.steps() == []


@pytest.mark.parametrize(
    "store, disk, expected", [((10,), (14, 16), 16), ((10, 20), (14, 16), 20), ((), (4,), 4), ((10,), (), 10)]
)
def test_the_newest_of_both_tiers_counts(tmp_path, local, store, disk, expected):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    save(checkpoints, *store)
    save(local, *disk)
    step = SimpleNamespace(abstract_state=abstract, init=None)
    assert_same(run.first_state(step, checkpoints, CONFIG, lambda: None, local), expected)
    checkpoints.close()


def test_saves_go_to_the_tier_that_is_due():
    calls = []
    tiers = {
        name: SimpleNamespace(save=lambda step, *_, name=name, **__: calls.append((name, step)))
        for name in ("store", "disk")
    }
    config = recipe(checkpoint_every=6, checkpoint_local_every=2)
    hook = hooks.CheckpointHook(config, tiers["store"], SimpleNamespace(skipped=0), 0, 0, tiers["disk"])
    loop.train(counting_step(), 0, FakePrefetch(), 0, 9, [hook], never)
    assert calls == [("disk", 2), ("disk", 4), ("store", 6), ("disk", 8), ("store", 9)]


def test_failed_saves_end_the_run_where_they_are_limited():
    checkpoints = SimpleNamespace(failures=0, folder="/store")
    checkpoints.save = lambda *_, **__: setattr(checkpoints, "failures", checkpoints.failures + 1)
    hook = hooks.CheckpointHook(
        recipe(checkpoint_every=2, max_failed_saves=3), checkpoints, SimpleNamespace(skipped=0), 0, 0
    )
    recorder = Recorder(every=1)
    with pytest.raises(
        UserError, match="max_failed_saves=3 checkpoints in a row could not be saved: make room in /sto"
    ):
        loop.train(counting_step(), 0, FakePrefetch(), 0, 50, [recorder, hook], never)
    assert recorder.seen[-1][1] == 6


def test_failures_in_a_row_are_counted(tmp_path, said, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "checkpoints", say=said.append)
    with monkeypatch.context() as patched:
        patched.setattr(type(checkpoints._manager), "save", lambda *_, **__: 1 / 0)
        save(checkpoints, 1)
        save(checkpoints, 2)
    assert checkpoints.failures == 2
    save(checkpoints, 3)
    assert checkpoints.failures == 0
    checkpoints.close()


def poisoned(config, bad):
    """Batches of which number `bad` has a sound that is not a number."""
    made = batches(config, 4, invalid=False)
    made[bad]["audio"][0] = np.nan
    return made


def test_a_bad_update_is_left_out_on_the_device():
    """Parameters and moments stay as they were, the step counts on, and the next batch is learned from."""
    config = recipe(unfused(), max_skipped_updates=1)
    step, host = make_step(config), poisoned(config, 1)
    state, history = run_steps(step, host[:1])
    before = jax.device_get(state)
    state, skipped = run_steps(step, host[1:2], state)
    after = jax.device_get(state)
    assert [line["skipped_update"] for line in history + skipped] == [0, 1] and math.isnan(skipped[0]["loss"])
    assert int(after.step) == 2
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, before.opt_state)
    state, history = run_steps(step, host[2:], state)
    assert all(math.isfinite(line["loss"]) and not line["skipped_update"] for line in history)
    assert any((state.params[name] != x).any() for name, x in before.params.items())


@pytest.mark.parametrize(
    "metrics, largest, left_out",
    [
        ({"loss": 1.0, "grad_norm": 3.0}, 0.0, False),
        ({"loss": 1.0, "grad_norm": 3.0}, 3.0, False),
        ({"loss": 1.0, "grad_norm": 3.0}, 2.9, True),
        ({"loss": math.inf, "grad_norm": 3.0}, 0.0, True),
        ({"loss": 1.0, "grad_norm": math.nan}, 9.0, True),
    ],
)
def test_which_updates_are_left_out(metrics, largest, left_out):
    maker = SimpleNamespace(config=recipe(max_grad_norm=largest))
    old, new = state_on(1), state_on(2)
    kept, skipped = TrainStep.unless_bad(maker, old, new, {name: np.float32(x) for name, x in metrics.items()})
    assert float(skipped) == left_out and int(kept.step) == 2
    jax.tree.map(np.testing.assert_array_equal, kept.params, (old if left_out else new).params)
    jax.tree.map(np.testing.assert_array_equal, kept.opt_state, (old if left_out else new).opt_state)


def bad_updates(steps, **changes):
    """Runs 20 counting steps, some of them marked as left out."""
    said, plain = [], counting_step(bad=steps)

    def step(state, batch):
        state, metrics = plain(state, batch)
        return state, metrics | {"skipped_update": np.float32(state in steps)}

    hook = hooks.UpdateHook(recipe(**changes), said.append)
    assert loop.train(step, 0, FakePrefetch(), 0, 20, [hook], never) == 20
    return said


def test_skipped_updates_are_named_and_limited():
    said = bad_updates((3, 7), max_skipped_updates=2)
    assert said[0].startswith("warning: step 3: loss=nan, grad_norm=2: this update is left out (1 of max_skipped_")
    with pytest.raises(loop.NonFinite, match="step 7: loss=nan.* more than max_skipped_updates=1 .*step7-0, step7-1"):
        bad_updates((3, 7), max_skipped_updates=1)


def test_a_spike_stops_where_nothing_may_be_skipped():
    hook = hooks.UpdateHook(recipe(max_grad_norm=1.9), print)
    with pytest.raises(loop.NonFinite, match="step 1: loss=1, grad_norm=2, with max_grad_norm=1.9: more than"):
        loop.train(counting_step(), 0, FakePrefetch(), 0, 20, [hook], never)


def test_metrics_are_json_without_what_is_not_finite(tmp_path):
    class Hook(hooks.MetricsHook):
        def _rates(self, step):
            return {}

    hook = Hook(
        recipe(log_every=1),
        tmp_path,
        SimpleNamespace(scalars=lambda *_: None),
        progress=SimpleNamespace(update=lambda *_, **__: None),
        prefetch=FakePrefetch(),
        last=9,
        resumed=0,
        skipped=0,
        goodput=lambda: 0.75,
    )
    hook.after_metrics(1, {"loss": math.nan, "grad_norm": 2.0, "valid": 16.0}, {})
    written = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert written == {"step": 1, "grad_norm": 2.0, "skipped": 0, "goodput": 0.75}


def test_time_is_counted_by_kind(tmp_path, monkeypatch):
    """Sums by hand: two attempts, the first of which dies after step 12 and is gone for 100 s."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(goodput, "time", SimpleNamespace(monotonic=lambda: clock.now, time=lambda: clock.now + 5e8))
    monkeypatch.setattr(goodput, "_began", 1000.0)
    monkeypatch.setattr(goodput, "_began_wall", 5e8 + 1000.0)
    prefetch, saver, other = SimpleNamespace(wait_seconds=0.0), loop.Hook(), loop.Hook()

    def attempt(first, start):
        clock.now += start
        made = goodput.Goodput(goodput.open_record(tmp_path), tmp_path, prefetch, first)
        made.count([saver, other, made], saver)
        return made

    one = attempt(0, 7.0)
    step = one.compiling(lambda *_: setattr(clock, "now", clock.now + 2.0))
    for number in range(12):  # of 2 s each, the first one compiles
        step(None, None)
        one.after_metrics(number + 1, {}, {})
    prefetch.wait_seconds, saver.seconds, other.seconds = 3.0, 1.0, 0.5
    one.write()
    expected = {
        "start": 7.0,
        "compilation": 2.0,
        "input": 3.0,
        "checkpoint": 1.0,
        "other": 0.5,
        "productive": 17.5,
        "repeated": 0.0,
        "down": 0.0,
    }
    assert one.spent() == pytest.approx(expected) and one.share() == pytest.approx(17.5 / 31)
    left = json.loads((tmp_path / "run.json").read_text())
    assert left["seconds"] == pytest.approx(expected) and left["last"]["step"] == 12 and left["attempts"] == 1

    clock.now += 100.0
    monkeypatch.setattr(goodput, "_began", clock.now)
    monkeypatch.setattr(goodput, "_began_wall", clock.now + 5e8)
    prefetch.wait_seconds, saver.seconds, other.seconds = 0.0, 0.0, 0.0
    two = attempt(10, 4.0)
    clock.now += 6.0
    with two.saving():
        clock.now += 1.0
    again = 2 * 17.5 / 12
    assert two.spent() == pytest.approx(
        expected
        | {"start": 11.0, "checkpoint": 2.0, "productive": 17.5 - again + 6.0, "repeated": again, "down": 100.0}
    )
    assert two.report().startswith("goodput 14 % over 2 attempts: productive 0:21, start 0:11")
    assert left["id"] == two._record["id"]
    two.ended = True
    two.close()
    assert goodput.resumed(json.loads((tmp_path / "run.json").read_text()), 10)["down"] == pytest.approx(100.0)


@pytest.mark.parametrize(
    "waits, message",
    [
        ([0.2, 0.1, 0.3], ""),
        (
            [0.2, 6.5, 0.3],
            r"process 1 \(host1\) waited 6.5 s of the last 100.0 s for its input, the median process 0.3 s",
        ),
        ([40.0, 40.0, 41.0], ""),  # all are slow: `input_wait` tells it
    ],
)
def test_straggler_is_named(waits, message):
    said = goodput.slowest([(f"host{number}", wait, 100.0) for number, wait in enumerate(waits)])
    assert bool(said) == bool(message)
    if message:
        assert re.match(message, said)


@pytest.mark.slow
def test_loop_benchmark(tmp_path, monkeypatch, capsys):
    """Metrics of the shape that is asked for; the loop's steps are real ones."""
    monkeypatch.setattr(parts, "make_mesh", lambda _: make_step(recipe(unfused())).mesh)
    monkeypatch.setattr(recipes, "load_recipe", lambda *_: recipe(unfused()))
    benchmark.main(["loop", "--config=any", "--steps=5", "--block=2", f"--json={tmp_path / 'loop.json'}"])
    metrics = json.loads((tmp_path / "loop.json").read_text())
    assert metrics["steps"] == 5 and metrics["bare_steps"] == 4
    assert metrics["bare_step_seconds"] > 0 and metrics["loop_step_seconds"] > 0
    assert "overhead_share" in capsys.readouterr().out
    benchmark.main(["loop", "--config=any", "--steps=1", "--block=1"])
    assert "bare_steps" in capsys.readouterr().out
    with pytest.raises(UserError, match="--block=10 must be from 1 to --steps=0"):
        benchmark.main(["loop", "--config=any", "--steps=0"])
