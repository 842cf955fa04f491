"""What compiled training steps show: collectives, how long gathered weights live, memory, FLOPs, precision."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import FAST_COMPILE, compile_step, make_step, on_mesh, recipe

from av_mae.benchmark import compiled, pod
from av_mae.models import closed_form_flops, layers
from av_mae.models.config import AVMAEConfig, DecoderConfig, FusionConfig, StreamConfig
from av_mae.train import sharding, step

PROGRAM = """HloModule jit_step, is_scheduled=true, num_partitions=16

%all-reduce-scatter (input: bf16[768,768]) -> bf16[192,768] {
  %input = bf16[768,768]{1,0} parameter(0)
  %all-reduce.2 = bf16[768,768]{1,0:T(8,128)(2,1)} all-reduce(%input), replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %dynamic-slice.5 = bf16[192,768]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%all-reduce.2, %a), sizes={192,768}
}

ENTRY %main (param: f32[192,768]) -> f32[192,768] {
  %w = bf16[192,768]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.6 = bf16[768,768]{1,0:T(8,128)(2,1)S(1)} all-gather(%w), replica_groups=mesh['a'=4,'b'=4] {'b'}
  %gather.9 = f32[64]{0} all-gather(%v), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}
  %copy.1 = bf16[768,768]{0,1} copy(%all-gather.6)
  %all-gather-start = (bf16[192,768]{1,0}, bf16[768,768]{1,0}) all-gather-start(%w), replica_groups=[4,4]<=[16]
  %all-gather-done = bf16[768,768]{1,0} all-gather-done(%all-gather-start)
  %fusion.1 = bf16[32,768]{1,0} fusion(%copy.1, %x), kind=kOutput, calls=%f, "estimated_cycles":"120"
  %fusion.2 = bf16[192,768]{1,0} fusion(%all-gather-done), calls=%all-reduce-scatter, "estimated_cycles":"30"
  %all-reduce.1 = f32[]{} all-reduce(%fusion.1), replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}
  ROOT %add = f32[192,768]{1,0} add(%fusion.2, %all-reduce.1)
}
"""
WHOLE = 768 * 768 * 2


def test_reads_collectives():
    found = [(c.kind, c.bytes, c.group, c.hidden) for c in compiled.collectives(PROGRAM)]
    assert found == [
        ("reduce-scatter", WHOLE, 4, False),
        ("all-gather", WHOLE, 4, False),
        ("all-gather", 256, 4, False),
        ("all-gather", WHOLE, 4, True),
        ("all-reduce", 4, 16, False),
    ]
    assert compiled.cycles(PROGRAM) == 150


def test_reads_how_long_values_live():
    assert compiled.most_gathered(PROGRAM) == 2 * WHOLE
    sooner = PROGRAM.replace("  %fusion.1 =", "  %late =").replace(
        "  %all-gather-start =", "  %fusion.1 = bf16[32,768]{1,0} fusion(%copy.1, %x), calls=%f\n  %all-gather-start ="
    )
    sooner = sooner.replace("%late = bf16[32,768]{1,0} fusion(%copy.1, %x)", "%late = bf16[32,768]{1,0} fusion(%x, %x)")
    assert compiled.most_gathered(sooner) == WHOLE + 256


LOOP = """HloModule jit_step, is_scheduled=true

%fused (p: bf16[4,49,64], q: bf16[4,64,32]) -> bf16[4,49,32] {
  %p = bf16[4,49,64]{2,1,0} parameter(0)
  %q = bf16[4,64,32]{2,1,0} parameter(1)
  ROOT %dot.1 = bf16[4,49,32]{2,1,0} dot(%p, %q), lhs_batch_dims={0}, lhs_contracting_dims={2}
}

%body (state: (s32[], bf16[12,16,768], bf16[12,16])) -> (s32[], bf16[12,16,768], bf16[12,16]) {
  %state = (s32[], bf16[12,16,768], bf16[12,16]) parameter(0)
  %w = bf16[12,16,768]{2,1,0} get-tuple-element(%state), index=1
  %slice.1 = bf16[16,768]{1,0} fusion(%w), kind=kLoop, calls=%sliced, backend_config={"estimated_cycles":"7"}
  %all-gather.1 = bf16[64,768]{1,0} all-gather(%slice.1), replica_groups={{0,1,2,3}}
  %fusion.1 = bf16[4,49,32]{2,1,0} fusion(%all-gather.1, %x), calls=%fused, backend_config={"estimated_cycles":"100"}
  ROOT %tuple.1 = (s32[], bf16[12,16,768], bf16[12,16]) tuple(%i, %w, %w)
}

%condition (state.1: (s32[], bf16[12,16,768], bf16[12,16])) -> pred[] {
  %state.1 = (s32[], bf16[12,16,768], bf16[12,16]) parameter(0)
  %turn = s32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%turn, %n), backend_config={"estimated_cycles":"1"}
}

ENTRY %main (w: bf16[12,16,768]) -> bf16[8,32] {
  %w.1 = bf16[12,16,768]{2,1,0} parameter(0)
  %all-gather.2 = bf16[32,768]{1,0} all-gather(%w.1), replica_groups={{0,1,2,3}}
  %while.1 = (s32[]) while(%tuple.2), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  %a = bf16[8,64]{1,0} bitcast(%all-gather.2)
  %b = bf16[64,32]{1,0} bitcast(%w.1)
  ROOT %convolution.1 = bf16[8,32] convolution(%a, %b), dim_labels=bf_io->bf, backend_config={"estimated_cycles":"50"}
}
"""
GATHERED = 64 * 768 * 2


def test_counts_every_turn_of_a_loop():
    found = [(c.kind, c.bytes) for c in compiled.collectives(LOOP)]
    assert found == [("all-gather", GATHERED)] * 12 + [("all-gather", GATHERED // 2)]
    assert compiled.repeats(LOOP) == {"fused": 12, "body": 12, "condition": 12, "main": 1}
    assert compiled.cycles(LOOP) == 12 * (7 + 100 + 1) + 50
    part = 16 * 768 * 2  # what a turn reads of %w, and slices of it, and gathers
    turn = part + part + part + GATHERED + GATHERED + 4 * 49 * 32 * 2 + 5
    assert compiled.further_turns(LOOP) == (11 * 2 * 4 * 49 * 64 * 32, 11 * turn)


def test_turns_of_a_loop_told_by_its_condition():
    """As TPUs' programs do: the turn is compared with a constant. 1 where that is none."""
    silent = LOOP.replace(', backend_config={"known_trip_count":{"n":"12"}}', "")
    assert set(compiled.turns(silent).values()) == {1}
    told = silent.replace("  %turn = s32[]", "  %n = s32[] constant(9)\n  %turn = s32[]").replace(
        "compare(%turn, %n), ", "compare(%turn, %n), direction=LT, "
    )
    assert compiled.turns(told) == {"body": 9, "condition": 9}


def test_a_collective_beside_products_counts_once():
    """As TPUs' programs name it: where it starts, in the fusions that it runs beside, and where it is done."""
    gather = "  %all-gather.{} = bf16[64,768]{{1,0}} all-gather(%p), channel_id=3, replica_groups={{{{0,1,2,3}}}}\n"
    target = (
        '  ROOT %custom-call.{0} = bf16[64,768] custom-call(%all-gather.{0}), custom_call_target="AsyncCollective{1}"\n'
    )
    parts = (
        ("start", gather.format(7) + target.format(7, "Start")),
        ("async_collective_fusion.1", gather.format(8)),
        ("done", gather.format(9) + target.format(9, "Done")),
    )
    head = "".join(f"%{name} (p: bf16[16,768]) -> bf16[64,768] {{\n{text}}}\n\n" for name, text in parts)
    entry = "".join(f"  %fusion.{i} = bf16[64,768] fusion(%w), calls=%{name}\n" for i, (name, _) in enumerate(parts))
    program = f"{head}ENTRY %main (w: bf16[16,768]) -> bf16[64,768] {{\n{entry}}}\n"
    found = [(one.kind, one.bytes, one.group, one.hidden) for one in compiled.collectives(program)]
    assert found == [("all-gather", GATHERED, 4, True)]


def test_what_lives_while_a_loop_runs():
    """A gathered weight of before the loop that is read after it, and the one of a turn; that of the next turn, which
    is gathered in this one, lives all the time."""
    assert compiled.most_gathered(LOOP) == GATHERED // 2 + GATHERED
    sooner = LOOP.replace("%a = bf16[8,64]{1,0} bitcast(%all-gather.2)", "%a = bf16[8,64]{1,0} bitcast(%w.1)")
    assert compiled.most_gathered(sooner) == GATHERED
    ahead = LOOP.replace("  %all-gather.1 =", "  %all-gather.3 = bf16[64,768]{1,0} all-gather(%x)\n  %all-gather.1 =")
    assert compiled.most_gathered(ahead) == GATHERED // 2 + GATHERED
    ahead = ahead.replace("tuple(%i, %w, %w)", "tuple(%i, %all-gather.3, %w)")
    assert compiled.most_gathered(ahead) == GATHERED // 2 + 2 * GATHERED


def test_counts_of_a_compiled_loop():
    """The compiler's FLOPs of a scan, its loop counted by turns, are those of the same layers in turn."""

    def scan(x, kernels):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0].sum()

    def unrolled(x, kernels):
        return functools.reduce(lambda x, kernel: jnp.tanh(x @ kernel), list(kernels), x).sum()

    x, kernels = jnp.ones((40, 96)), jnp.ones((7, 96, 96))
    programs = [jax.jit(jax.grad(f, (0, 1))).lower(x, kernels).compile() for f in (scan, unrolled)]
    (ours, _), unrolled_too = (compiled.further_turns(program.as_text()) for program in programs)
    once, flops = (program.cost_analysis()["flops"] for program in programs)
    assert unrolled_too == (0, 0) and once < 0.3 * flops
    assert once + ours == pytest.approx(flops, rel=0.05)


def test_counts_matrix_products():
    def f(a, b, x):
        def body(carry, row):
            return carry + row @ b, None

        return jax.lax.scan(body, jnp.einsum("gnk,gmk->gnm", a, a)[0, 0, :5], x)[0]

    jaxpr = jax.make_jaxpr(f)(jnp.zeros((3, 49, 64)), jnp.zeros((7, 5)), jnp.zeros((11, 7))).jaxpr
    sizes = sorted(compiled.products(jaxpr))
    assert sizes == [(1, 1, 7, 5)] * 11 + [(3, 49, 64, 49)]
    assert compiled.matmul_flops(sizes) == 2 * (11 * 35 + 3 * 49 * 64 * 49)
    assert compiled.matmul_flops(sizes, 128) == 2 * (11 * 8 * 128 * 128 + 3 * 56 * 128 * 128)


ENCODER = {"width": 64, "depth": 4, "heads": 4}
MODEL = AVMAEConfig(
    image=StreamConfig(size=(48, 80), patch=16, mask_ratio=0.5, **ENCODER),
    audio=StreamConfig(size=(48, 48), channels=1, patch=16, mask_ratio=0.5, **ENCODER),
    fusion=FusionConfig(kind="token", tokens=(2, 1, 1), heads=4),
    decoder=DecoderConfig(width=64, depth=2, heads=4),
)


@functools.cache
def program(shape: tuple[int, int, int], scan: str = "on") -> tuple[step.TrainStep, str]:
    """The step on a mesh, compiled for eight CPU devices, equal layers as loops.

    In the order that needs least memory: by default, CPUs run what can run, so all gathers come first.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "SMALL", 64)
        patch.setitem(FAST_COMPILE, "xla_cpu_scheduler_type", "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED")
        train_step = on_mesh(recipe(MODEL, batch_size=48, scan_layers=scan), *shape)
        return train_step, compile_step(train_step).as_text()


UNROLLED = pytest.param((2, 4, 1), "off", marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "shape, scan", [((2, 4, 1), "on"), UNROLLED, pytest.param((1, 2, 4), "on", marks=pytest.mark.slow)]
)
def test_only_weights_are_gathered(shape, scan):
    """No all-gather of activations: nothing that is gathered has a dimension of clips, or is larger than a weight. Over
    'tensor', activations are summed; nothing is exchanged in other ways."""
    train_step, text = program(shape, scan)
    largest = max(4 * math.prod(x.shape) for x in train_step.shapes.params.values())
    clips = {6, 12, 24, 48}  # of a device, of several, of all; no parameter has such a dimension
    assert not clips & {n for x in train_step.shapes.params.values() for n in x.shape}
    found = [one for one in compiled.collectives(text) if one.bytes >= 4096]
    assert {one.kind for one in found} <= {"all-gather", "all-reduce", "reduce-scatter"}
    gathered = [one for one in found if one.kind == "all-gather"]
    assert len(gathered) > 50 and not any(clips & {*one.shape} or one.bytes > largest for one in gathered)
    summed = {one.group for one in found if one.kind == "all-reduce" and 24 in one.shape}
    assert summed == ({4} if shape[2] == 4 else set())


@pytest.mark.parametrize("shape, scan", [((2, 4, 1), "on"), UNROLLED])
def test_weights_stay_no_longer_than_their_layer(shape, scan):
    """Gathered weights in memory at once: at most those of a layer, not of the model; and no loop hands them on,
    stacked over its turns."""
    train_step, text = program(shape, scan)
    every = {name: math.prod(x.shape) * 4 for name, x in train_step.shapes.params.items()}
    whole = sum(n for name, n in every.items() if train_step.param_shardings[name].gathered)
    layer = sum(n for name, n in every.items() if ".1." in name and name.startswith("encoder."))
    alive = compiled.most_gathered(text)
    assert layer < whole / 4
    assert 0 < alive <= layer
    shapes = {array[1] for _, _, body in compiled.computations(text) for one in body for array in one.arrays}
    sharded, stacked = (
        {(4, 16, 256), (4, 64, 64)},
        {(4, 64, 256), (4, 256, 64)},
    )  # of fc1 and fc2: in the state, and whole
    assert (sharded <= shapes) == (scan == "on") and not stacked & shapes


def residual_bytes(remat: str) -> int:
    """What the forward pass keeps for the backward pass, the parameters themselves not counted."""
    train_step = make_step(recipe(MODEL, batch_size=64, remat=remat))
    params = train_step.abstract_state().params
    rows = {
        "image": jnp.zeros((64, 48, 80, 3), jnp.uint8),
        "audio": jnp.zeros((64, 48, 48)),
        "weight": jnp.ones(64),
        "image_noise": jnp.zeros((64, 15)),
        "audio_noise": jnp.zeros((64, 9)),
    }
    kept = jax.eval_shape(
        lambda params: jax.vjp(lambda trained: train_step.weighted_loss({}, {}, trained, rows)[0], params)[1], params
    )
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept)) - sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(params)
    )


def test_what_rematerialisation_keeps():
    """All of a layer, its matrix products, its input. (Compiled for CPUs the program's memory does not tell: there,
    XLA drops the barriers behind which jax.checkpoint computes again.)"""
    kept = {remat: residual_bytes(remat) for remat in ("none", "dots", "full")}
    assert kept["full"] < 0.5 * kept["dots"] and kept["dots"] < 0.8 * kept["none"]


@pytest.mark.slow
def test_memory_of_accumulation():
    """A part of the clips at a time; the new state in the memory of the old."""

    def memory_of(**changes):
        return compile_step(make_step(recipe(MODEL, batch_size=64, **changes))).memory_analysis()

    whole, parts = memory_of(), memory_of(grad_accumulation=8)
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(make_step(recipe(MODEL)).abstract_state()))
    parameters = state / 3
    # beside an eighth of the activations: the sum of the gradients and those of the part
    assert parts.temp_size_in_bytes < whole.temp_size_in_bytes / 8 + 2.5 * parameters
    assert parts.alias_size_in_bytes == pytest.approx(state, rel=0.01)


def test_precision():
    """bfloat16 matrix products, float32 softmax, norms and losses."""
    train_step = make_step(recipe(MODEL, dtype="bfloat16"))
    rows = {
        "image": jnp.zeros((2, 48, 80, 3), jnp.uint8),
        "audio": jnp.zeros((2, 48, 48)),
        "weight": jnp.ones(2),
        "image_noise": jnp.zeros((2, 15)),
        "audio_noise": jnp.zeros((2, 9)),
    }
    loss = functools.partial(train_step.weighted_loss, {}, {})
    jaxpr = jax.make_jaxpr(loss)(train_step.abstract_state().params, rows).jaxpr
    seen = {"dot_general": set(), "exp": set(), "rsqrt": set(), "reduce_sum": set()}

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in seen:
                seen[equation.primitive.name] |= {str(operand.aval.dtype) for operand in equation.invars}
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jaxpr)
    assert seen["dot_general"] == {"bfloat16"}
    assert seen["exp"] == seen["rsqrt"] == {"float32"} and "bfloat16" not in seen["reduce_sum"]
    assert {x.aval.dtype for x in jaxpr.outvars} == {jnp.dtype("float32")}


def test_logits_are_summed_in_float32():
    """Attention of bfloat16 queries and keys keeps more than bfloat16 would of logits that nearly cancel."""
    q = jnp.asarray([[[[16.0, 16.0]], [[16.0, 1.0]]]], jnp.bfloat16)
    k = jnp.asarray([[[[16.0, 1.0]], [[16.0, 1.0625]]]], jnp.bfloat16)
    weights = layers.attention_weights(q, k, 1.0)
    np.testing.assert_allclose(weights[0, 0, 0], 1 / (1 + np.exp([1.0, -1.0])), rtol=1e-5)


def test_products_of_the_step_match_the_closed_form():
    """Three times the forward count of the closed form; the embedding's input needs no gradient."""
    train_step = make_step(recipe(MODEL, batch_size=4))
    batch = pod.abstract_batch(train_step.config, train_step)
    found = compiled.matmul_flops(
        compiled.products(jax.make_jaxpr(train_step.train_step)(train_step.abstract_state(), batch).jaxpr)
    )
    embedded = sum(2 * stream.keep * stream.patch_values * stream.width for stream in (MODEL.image, MODEL.audio))
    assert found == 4 * (3 * closed_form_flops(MODEL) - embedded)


def test_projections_take_clips_and_tokens_as_rows():
    """A kernel meets all clips' tokens in one product without batch dimension, whatever their odd numbers."""
    linear = layers.Linear(24, 40, rngs=step.nnx.Rngs(0))
    graph, state = step.nnx.split(linear)
    jaxpr = jax.make_jaxpr(lambda x: step.nnx.merge(graph, state)(x))(jnp.zeros((6, 49, 24)))
    assert list(compiled.products(jaxpr.jaxpr)) == [(1, 6 * 49, 24, 40)]
