"""`benchmark pod`: the training step of a recipe, compiled for a TPU slice that need not be there.

The compiler is libtpu's (the `tpu` extra, any Linux machine); its program, memory plan and counts are the real ones,
the times are predictions by roofline.py.
"""

import dataclasses
import importlib.util
import os
import pathlib
import re
import tempfile
from typing import Any

import jax
import numpy as np

from av_mae import benchmark, models
from av_mae.benchmark import compiled as programs
from av_mae.benchmark import roofline
from av_mae.benchmark.roofline import CLIPS_PER_CORE, TOPOLOGIES, Chip, Metrics
from av_mae.benchmark.step import random_batch
from av_mae.config import TrainConfig
from av_mae.console import Progress
from av_mae.errors import UserError
from av_mae.train.optimizer import Length
from av_mae.train.sharding import fitted, make_mesh
from av_mae.train.step import PASSES, Pretraining, TrainStep, count_parameters

# What libtpu asks of a machine that is no TPU host.
ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}


def topology_devices(name: str, slices: int) -> list:
    """The devices of `slices` slices, none of which need be there.

    Raises:
      UserError: no such topology, or libtpu is not installed.
    """
    if name not in TOPOLOGIES:
        raise UserError(f"no topology {name!r}; known are {', '.join(TOPOLOGIES)}")
    if slices < 1:
        raise UserError(f"--slices={slices} must be at least 1")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for TPUs needs libtpu: pip install 'av_mae[tpu]' (Linux; no TPU is needed)")
    from jax.experimental import topologies

    os.environ.update({key: os.environ.get(key, value) for key, value in ENVIRONMENT.items()})
    jax.config.update("jax_platforms", "cpu")
    options = {"num_slices": slices} if slices > 1 else {}
    return list(topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices)


def abstract_batch(config: TrainConfig, train_step: TrainStep) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what `TrainStep.step` takes."""
    shapes = jax.eval_shape(lambda: random_batch(config))
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=train_step.rows) for name, x in shapes.items()}


def state_bytes(train_step: TrainStep) -> int:
    """Bytes of parameters and optimizer on each chip."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(train_step.abstract_state())
    )


def advice(config: TrainConfig, state: int, over: int, memory: int, devices: int, fsdp: int) -> str:
    """A setting that would make a step fit which needs `over` bytes more than the `memory` of a chip."""
    activations = memory + over - state
    sizes = [n for n in range(fsdp + 1, devices + 1) if devices % n == 0 and state * fsdp / n < 0.4 * memory]
    if state > memory / 2 and sizes:
        left = state * fsdp / sizes[0] / 1e9
        return f"--config.mesh.fsdp={sizes[0]} would shard parameters and moments to {left:.1f} GB"
    rows = config.batch_size // devices
    for parts in range(config.grad_accumulation + 1, rows + 1):
        if rows % parts == 0 and state + activations * config.grad_accumulation / parts < 0.9 * memory:
            return f"--config.grad_accumulation={parts} would keep the activations of 1/{parts} of the clips at a time"
    return "--config.remat=full would keep only what enters each layer"


def does_not_fit(error: Exception, config: TrainConfig, train_step: TrainStep, name: str) -> Metrics:
    """Metrics of a step that the compiler refused for want of memory; other errors are raised again."""
    match = re.search(r"Used ([\d.]+)([MGT]) of ([\d.]+)([MGT]) hbm", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or not match:
        raise error
    units = {"M": 2**20, "G": 2**30, "T": 2**40}
    used, memory = (int(float(match.group(i)) * units[match.group(i + 1)]) for i in (1, 3))
    state, mesh = state_bytes(train_step), train_step.mesh
    setting = advice(config, state, used - memory, memory, mesh.size, mesh.shape["fsdp"])
    return {
        "topology": name,
        "fits": False,
        "bytes_per_chip": {"total": used, "memory": memory, "state": state},
        "flops": None,
        "collectives": {},
        "predicted_step_seconds": None,
        "predicted_mfu": None,
        "refusal": f"{config.batch_size} clips on {mesh.size} chips need {used / 1e9:.1f} GB each, "
        f"{(used - memory) / 1e9:.1f} GB more than the {memory / 1e9:.1f} GB there are: {setting}",
    }


def compile_step(lowered: jax.stages.Lowered) -> tuple[Any, str]:
    """The compiled program and its text, as the compiler itself writes it down.

    What `as_text` gives is read by JAX's own XLA, which does not know all that libtpu's writes: gathers that v5p and
    v6e leave to their SparseCores.
    """
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        texts = list(pathlib.Path(folder).glob("*.after_codegen.txt"))
        return compiled, texts[0].read_text() if len(texts) == 1 else compiled.as_text() or ""


def memory_plan(plan: Any, state: int, chip: Chip) -> dict[str, int]:
    """Bytes of a chip by what takes them, their `total`, and the `memory` that there is.

    Args:
      plan: the compiler's, of the step.
      state: bytes of parameters and optimizer.
      chip: the kind of chip.
    """
    kept = {
        "state": state,
        "batch": plan.argument_size_in_bytes - state,
        "temporary": plan.temp_size_in_bytes,
        "program": plan.generated_code_size_in_bytes,
        "new": plan.output_size_in_bytes - plan.alias_size_in_bytes,
    }
    return kept | {"total": sum(kept.values()), "memory": chip.memory}


def measure(config: TrainConfig, name: str, slices: int = 1) -> Metrics:
    """The metrics of `benchmark pod`; bytes, FLOPs and seconds are those of one chip.

    Raises:
      UserError: unknown topology; the mesh, the batch or the model does not fit it.
    """
    devices = topology_devices(name, slices)
    chip, shape = TOPOLOGIES[name]
    parameters = count_parameters(Pretraining(config.model))
    mesh = fitted(config.mesh, devices, parameters, chip.memory)
    config = dataclasses.replace(config, mesh=mesh)
    train_step = TrainStep(config, make_mesh(mesh, devices), Length(1000, 10, 1000))
    with Progress(2, f"compiling for {name}", "stages") as progress:
        traced = train_step.step.trace(train_step.abstract_state(), abstract_batch(config, train_step))
        lowered = traced.lower()
        progress.update(stage="lowered")
        try:
            compiled, program = compile_step(lowered)
        except jax.errors.JaxRuntimeError as error:
            return does_not_fit(error, config, train_step, name)
        progress.update(stage="compiled")
    sizes, chips, cost = train_step.mesh.shape, train_step.mesh.size, compiled.cost_analysis()
    products = list(programs.products(traced.jaxpr.jaxpr))
    padded = programs.matmul_flops(products, chip.tile) / chips
    more_flops, more_bytes = programs.further_turns(program)
    across = (sizes["data"], sizes["data"] * sizes["fsdp"], chips)
    kinds = roofline.exchanges(programs.collectives(program), chip, shape, slices, across)
    memory = memory_plan(compiled.memory_analysis(), state_bytes(train_step), chip)
    by_clips = memory["temporary"] + memory["batch"]
    largest = int((chip.memory - memory["total"] + by_clips) / by_clips * config.batch_size / chips) * chips
    metrics = {
        "topology": name,
        "slices": slices,
        "chips": chips,
        "mesh": dict(sizes),
        "fits": memory["total"] <= chip.memory,
        "batch_size": config.batch_size,
        "largest_batch": largest,
        "bytes_per_chip": memory,
        "flops": cost["flops"] + more_flops,
        "closed_form_flops": PASSES * models.closed_form_flops(config.model) * config.batch_size / chips,
        "matmul_flops": programs.matmul_flops(products) / chips,
        "padded_flops": padded,
        "bytes_accessed": cost["bytes accessed"] + more_bytes,
        "collectives": kinds,
        "compiler_cycle_seconds": programs.cycles(program) / chip.clock,
        "gathered_bytes": programs.most_gathered(program),
        "parameters": parameters,
    }
    return metrics | roofline.predicted(metrics, chip)


def recipe_hours(metrics: Metrics, config: TrainConfig, clips: int) -> Metrics:
    """Predicted hours of a whole recipe over `clips` clips per epoch, and the host cores that its input needs."""
    rate = config.batch_size / metrics["predicted_step_seconds"]
    total = config.epochs * clips or config.steps * config.batch_size
    return {
        "recipe_clips": total,
        "predicted_hours": total / rate / 3600,
        "clips_per_second": rate,
        "input_cores": rate / CLIPS_PER_CORE,
    }


def tables(metrics: Metrics) -> list[benchmark.Table]:
    """What the command prints: the plan, memory by kind, exchanges by kind, predictions."""
    gigabytes = lambda n: f"{n / 1e9:.3f} GB"
    kinds = metrics["collectives"]
    exchanges = [
        (kind, str(one["count"]), gigabytes(one["bytes"]), f"{one['seconds']:.5f}", f"{one['hidden_seconds']:.5f}")
        for kind, one in kinds.items()
    ]
    flops = ("flops", "closed_form_flops", "matmul_flops", "padded_flops")
    predicted = ["predicted_step_seconds", "predicted_mfu", "compiler_cycle_seconds"]
    predicted += ["clips_per_second", "predicted_hours", "input_cores"]
    return [
        [
            ("plan", "value"),
            ("chips", str(metrics["chips"])),
            ("mesh", " × ".join(f"{axis} {size}" for axis, size in metrics["mesh"].items())),
            ("clips per step", str(metrics["batch_size"])),
            ("largest batch that fits", str(metrics["largest_batch"])),
        ],
        [
            ("memory of a chip", "bytes"),
            *((kind, gigabytes(n)) for kind, n in metrics["bytes_per_chip"].items()),
            ("gathered weights at once", gigabytes(metrics["gathered_bytes"])),
        ],
        [
            ("work of a chip", "value"),
            *((name, f"{metrics[name] / 1e12:.3f} TFLOP") for name in flops),
            ("bytes_accessed", gigabytes(metrics["bytes_accessed"])),
        ],
        [("exchange", "count", "bytes", "seconds", "beside others"), *exchanges],
        [
            ("prediction", "value"),
            *((f"{part} seconds", f"{n:.5f}") for part, n in metrics["seconds"].items()),
            *((name, f"{metrics[name]:.5g}") for name in predicted if name in metrics),
        ],
    ]
