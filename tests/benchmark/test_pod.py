"""`benchmark pod`: topologies, the roofline by hand, what does not fit; with libtpu (extra `tpu`) a real compilation.

Where libtpu cannot be imported, the last test is skipped: no TPU program is compiled there.
"""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest
from tiny_training import make_step, on_mesh, recipe

from av_mae.benchmark import __main__ as benchmark
from av_mae.benchmark import pod, roofline
from av_mae.benchmark.compiled import Collective
from av_mae.benchmark.roofline import CHIPS
from av_mae.errors import UserError
from av_mae.train import step
from av_mae.train import step as objective

V5E, V5P = CHIPS["v5e"], CHIPS["v5p"]


@pytest.mark.parametrize("name", ["v5e:5x5", "v9z:4x4", "v5p:4x4", "v6e:32x32", "4x4", ""])
def test_unknown_topology_is_refused(name):
    with pytest.raises(UserError, match="no topology .*; known are v5e:2x2, .*v5e:16x16.*v5p:4x4x4.*v6e:16x16"):
        pod.topology_devices(name, 1)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs libtpu: pip install 'av_mae\[tpu\]'"):
        pod.topology_devices("v5e:4x4", 1)
    with pytest.raises(UserError, match="--slices=0 must be at least 1"):
        pod.topology_devices("v5e:4x4", 0)


@pytest.mark.parametrize(
    "kind, size, group, chip, shape, slices, expected",
    [
        ("all-reduce", 1e9, 256, V5E, (16, 16), 1, 2e9 * 255 / 256 / 200e9),  # closed rings, all links
        ("all-reduce", 1e9, 16, V5E, (4, 4), 1, 2e9 * 15 / 16 / 100e9),  # open: half of the links
        (
            "all-gather",
            1e9,
            16,
            V5E,
            (16, 16),
            1,
            1e9 * 15 / 16 / 100e9,
        ),  # one closed ring: the links of one of two axes
        ("all-gather", 1e9, 4, V5E, (4, 4), 1, 1e9 * 3 / 4 / 50e9),
        ("reduce-scatter", 1e9, 64, V5P, (4, 4, 4), 1, 1e9 * 63 / 64 / 600e9),
        ("reduce-scatter", 1e9, 4, V5P, (4, 4, 4), 1, 1e9 * 3 / 4 / 200e9),
        ("all-reduce", 1e9, 1, V5E, (4, 4), 1, 0),
        ("all-reduce", 1e9, 1024, V5E, (16, 16), 4, 2e9 * 255 / 256 / 200e9 + 2e9 / 256 * 3 / 4 / 3.1e9),
    ],
)
def test_seconds_of_an_exchange(kind, size, group, chip, shape, slices, expected):
    assert roofline.exchange_seconds(kind, size, group, chip, shape, slices) == pytest.approx(expected)


def test_exchanges_by_kind():
    found = [
        Collective("all-gather", 10**9, 16, False, ()),
        Collective("all-gather", 10**9, 16, True, ()),
        Collective("all-reduce", 10**9, 4, False, ()),
    ]
    kinds = roofline.exchanges(found, V5E, (16, 16), 1, ())
    once = 15 / 16 / 100
    assert kinds["all-gather"] == {
        "count": 2,
        "bytes": 2 * 10**9,
        "seconds": pytest.approx(once),
        "hidden_seconds": pytest.approx(once),
    }
    assert kinds["all-reduce"]["seconds"] == pytest.approx(2 * 3 / 4 / 100)
    assert roofline.step_seconds(2.0, 3.0, 0.5, 1.0) == 3.5 and roofline.step_seconds(2.0, 1.0, 0.5, 4.0) == 4.5


def test_curve():
    """Data parallel, 100 million parameters: one sum of 0.2 GB; beyond a pod also through the network."""
    seconds = {"compute": 0.01, "memory": 0.005}
    measured = {"topology": "v5e:4x4", "seconds": seconds, "mesh": {"fsdp": 1}, "parameters": 10**8}
    rows = {row["chips"]: row for row in roofline.curve(measured)}
    assert rows[256]["exchange_seconds"] == pytest.approx(0.4 * 255 / 256 / 200)
    assert rows[256]["efficiency"] == pytest.approx(0.01 / (0.01 + 0.4 * 255 / 256 / 200))
    assert (rows[1024]["slices"], rows[1024]["shape"], rows[1024]["limit"]) == (4, "16x16", "all-reduce")
    assert rows[1024]["exchange_seconds"] == pytest.approx(rows[256]["exchange_seconds"] + 0.4 / 256 * 3 / 4 / 3.1)
    sharded = roofline.parallel_exchanges(V5E, 256, 16, 10**8)
    assert sharded["all-gather"] == pytest.approx(2 * 0.2 * 15 / 16 / 100)
    assert sharded["reduce-scatter"] == pytest.approx(sharded["all-gather"] / 2)
    assert sharded["all-reduce"] == pytest.approx(2 * 0.2 / 16 * 15 / 16 / 100)


def test_hours_of_a_recipe():
    metrics = {"predicted_step_seconds": 0.25}
    hours = pod.recipe_hours(metrics, recipe(batch_size=1000, steps=0, epochs=2.0), 7_200_000)
    assert hours == {
        "recipe_clips": 14_400_000.0,
        "predicted_hours": 1.0,
        "clips_per_second": 4000.0,
        "input_cores": 16.0,
    }


def refusal(used: str, memory: str) -> jax.errors.JaxRuntimeError:
    return jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
        f"memory space hbm. Used {used} of {memory} hbm. Exceeded hbm capacity by 1."
    )


def test_what_does_not_fit_says_by_how_much_and_what_would():
    train_step = on_mesh(recipe(), 4, 1)
    metrics = pod.does_not_fit(refusal("40.00M", "15.75M"), train_step.config, train_step, "v5e:2x2")
    assert metrics["fits"] is False and metrics["bytes_per_chip"]["total"] == 40 * 2**20
    assert metrics["refusal"].startswith("16 clips on 4 chips need 0.0 GB each, 0.0 GB more than the 0.0 GB")
    assert metrics["refusal"].endswith(
        "--config.grad_accumulation=4 would keep the activations of 1/4 of the clips at a time"
    )
    state = pod.state_bytes(train_step)
    assert state == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(train_step.abstract_state()))
    sharded = pod.advice(train_step.config, state, state, state, 4, 1)
    assert sharded == f"--config.mesh.fsdp=4 would shard parameters and moments to {state / 4 / 1e9:.1f} GB"
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        pod.does_not_fit(jax.errors.JaxRuntimeError("INTERNAL"), train_step.config, train_step, "v5e:2x2")


def test_command_writes_its_metrics_before_it_refuses(monkeypatch, tmp_path):
    train_step = make_step(recipe())
    monkeypatch.setattr(
        pod,
        "measure",
        lambda config, name, slices: pod.does_not_fit(refusal("3.00G", "2.00G"), train_step.config, train_step, name),
    )
    with pytest.raises(UserError, match="need 3.2 GB each, 1.1 GB more than the 2.1 GB there are: --config"):
        benchmark.main(
            ["pod", "--topology=v5e:4x4", "--config=configs/pretrain.py:tiny", f"--json={tmp_path}/pod.json"]
        )
    metrics = json.loads((tmp_path / "pod.json").read_text())
    assert metrics["fits"] is False and metrics["topology"] == "v5e:4x4"


def test_tables_of_scaling(tmp_path, capsys):
    """From metrics of a compiled step: 0.4 GB of gradients to sum, 50 ms without exchanges, 512 clips of 36 million."""
    metrics = {
        "config": "vggsound",
        "topology": "v5e:4x4",
        "fits": True,
        "chips": 16,
        "batch_size": 512,
        "mesh": {"fsdp": 1},
        "bytes_per_chip": {"total": 8e9},
        "flops": 4.1e12,
        "closed_form_flops": 4e12,
        "collectives": {"all-reduce": {"seconds": 0.007, "hidden_seconds": 0.0}},
        "predicted_mfu": 0.3456,
        "predicted_step_seconds": 0.057,
        "seconds": {"compute": 0.02, "memory": 0.05},
        "parameters": 2 * 10**8,
        "recipe_clips": 36e6,
    }
    (tmp_path / "a.json").write_text(json.dumps(metrics))
    benchmark.main(["scaling", f"{tmp_path}/a.json", f"--plot={tmp_path}/a.png"])
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines() if line]
    assert cells[2] == ["vggsound", "v5e:4x4", "32", "8.0", "4.10", "+2.5%", "57.0", "0.35", "all-reduce"]
    on_16, on_256 = 0.8 * 15 / 16 / 100, 0.8 * 255 / 256 / 200
    row = next(row for row in cells[3:] if row[:3] == ["vggsound", "v5e", "1"])
    assert row[3:5] + row[8:9] == ["50.0", f"{0.05 / (0.05 + on_16):.2f}", f"{0.05 / (0.05 + on_256):.2f}"]
    row = next(row for row in cells[3:] if row[:3] == ["vggsound", "v5e", "16"])
    rate = 512 / (0.05 + on_16)
    assert row[3:] == ["32", f"{rate:,.0f}", f"{36e6 / rate / 3600:.2f}", f"{rate / 250:.0f}"]
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_tables_of_scaling_refuse(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    for arguments, message in (
        ([], "--share=0.0 must be between 0 and 1"),
        (["--share=2"], "--share=2.0 must be"),
        ([f"{tmp_path}/a.json"], "holds no metrics of benchmark pod"),
        ([f"{tmp_path}/b.json"], "cannot read the metrics"),
    ):
        with pytest.raises(UserError, match=message):
            benchmark.main(["scaling", *arguments])


def test_parameters_counted_by_layers():
    model = recipe().model
    deep = dataclasses.replace(
        model, image=dataclasses.replace(model.image, depth=3), audio=dataclasses.replace(model.audio, depth=3)
    )
    assert roofline.count_layers(deep) == step.count_parameters(objective.Pretraining(deep))


def test_the_program_comes_with_its_text():
    compiled, program = pod.compile_step(jax.jit(lambda x: (x @ x).sum()).lower(np.ones((8, 8), np.float32)))
    assert program == compiled.as_text() and "ENTRY" in program
    np.testing.assert_allclose(compiled(np.ones((8, 8), np.float32)), 512)


@pytest.mark.slow
@pytest.mark.parametrize("topology, batch, share", [("v5e:2x2", 64, 0.2), ("v5p:2x2x1", 128, 0.35)])
def test_compiles_for_a_slice_that_is_not_there(topology, batch, share, tmp_path, capsys):
    """The whole command at the tiny size: its keys, FLOPs as in the closed form, one sum of all gradients."""
    pytest.importorskip("libtpu", reason="libtpu (the `tpu` extra) is not installed: no TPU program is compiled here")
    model = ("image.depth=4", "audio.depth=4", "decoder.depth=1")
    command = [
        "pod",
        f"--topology={topology}",
        "--config=configs/pretrain.py:tiny",
        f"--config.batch_size={batch}",
        "--config.mesh.fsdp=4",
        *(f"--config.model.{key}" for key in model),
    ]
    benchmark.main([*command, f"--json={tmp_path}/pod.json", f"--plot={tmp_path}/pod.png", "--clips=1000"])
    metrics = json.loads((tmp_path / "pod.json").read_text())
    assert metrics["fits"] and metrics["chips"] == 4 and metrics["topology"] == topology
    assert metrics["matmul_flops"] == pytest.approx(metrics["closed_form_flops"], rel=0.05)
    assert metrics["flops"] == pytest.approx(metrics["closed_form_flops"], rel=0.15)  # narrow: more elementwise work
    gathered = metrics["collectives"]["all-gather"]["bytes"]
    whole = 2 * metrics["parameters"]  # bfloat16
    assert 1.5 * whole < gathered <= 2 * whole  # forward, and backward but for the embeddings
    assert metrics["gathered_bytes"] < share * whole  # of loops over four layers; 0.14 and 0.31 with libtpu 0.0.52
    assert metrics["predicted_step_seconds"] > 0 and 0 < metrics["predicted_mfu"] < 1
    assert (tmp_path / "pod.png").stat().st_size > 1000 and "largest batch that fits" in capsys.readouterr().out
