"""The collectives that are read from a compiled program have exactly the bytes that it sends."""

import jax
import jax.numpy as jnp
import pytest
from conftest import mesh_of
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hybrid_attn.plan.collectives import arrays, axes_of, collectives, parse, replica_groups

T, D = 24, 20  # of a shard: float32 [24, 20] is 1,920 bytes
SHARD = 4 * T * D


def compiled(function, mesh):
    """The collectives of `function` of a float32 [T, D] on each device of `mesh`, inside shard_map."""
    every = P(tuple(mesh.axis_names))
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(function, in_specs=every, out_specs=every, check_vma=False)
        x = jax.ShapeDtypeStruct((T * mesh.size, D), jnp.float32, sharding=NamedSharding(mesh, every))
        return collectives(jax.jit(mapped).lower(x).compile().as_text(), mesh.shape)


def loop(function, turns):
    return lambda x: jax.lax.scan(lambda x, _: (function(x), None), x, None, length=turns)[0]


def gather(x):
    with jax.named_scope("there"):
        return jnp.tanh(jax.lax.all_gather(x, "context", tiled=True)[T : 2 * T])


CASES = {
    "all-gather": (gather, ("context",), 4, 3 * SHARD),
    "reduce-scatter": (
        lambda x: jnp.tile(jnp.tanh(jax.lax.psum_scatter(x, "context", tiled=True)), (4, 1)),
        ("context",), 4, SHARD * 3 // 4,
    ),
    "all-reduce": (lambda x: jnp.tanh(jax.lax.psum(x, ("fsdp", "context"))), ("fsdp", "context"), 8, 2 * SHARD * 7 // 8),
    "collective-permute": (
        lambda x: jnp.tanh(jax.lax.ppermute(x, "context", [(0, 1), (1, 2), (2, 3)])), ("context",), 2, SHARD,
    ),
    "all-to-all": (
        lambda x: jnp.tanh(jax.lax.all_to_all(x, "context", 0, 1, tiled=True)).reshape(T, D), ("context",), 4, SHARD * 3 // 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_a_collective_in_a_loop_has_its_bytes_axes_and_iterations(kind):
    function, axes, devices, size = CASES[kind]
    (collective,) = compiled(loop(function, 3), mesh_of(fsdp=2, context=4))
    assert (collective.kind, collective.axes, collective.devices) == (kind, axes, devices)
    assert (collective.bytes, collective.times, collective.total) == (size, 3, 3 * size)
    assert collective.types == ("f32",) * len(collective.types)


def test_loops_in_loops_multiply_and_a_call_outside_counts_once():
    collectives = compiled(lambda x: gather(loop(loop(gather, 3), 5)(x)), mesh_of(context=4, tensor=2))
    assert sorted(x.times for x in collectives) == [1, 15]
    assert all("there" in x.scope and not x.backward for x in collectives)


def test_the_gradient_of_a_gather_is_a_scatter_of_the_backward_pass():
    def gradient(x):
        return jax.grad(lambda x: gather(x).sum())(x)

    collectives = {x.kind: x for x in compiled(gradient, mesh_of(context=8))}
    assert set(collectives) == {"all-gather", "reduce-scatter"}
    assert collectives["all-gather"].bytes == collectives["reduce-scatter"].bytes == 7 * SHARD
    assert (collectives["all-gather"].backward, collectives["reduce-scatter"].backward) == (False, True)


def test_a_collective_among_single_devices_is_none():
    assert compiled(lambda x: jax.lax.psum(x, "data") + 1, mesh_of(context=4)) == []


def test_replica_groups_are_read_in_each_way_of_writing_them():
    along_the_first = [(0, 4), (1, 5), (2, 6), (3, 7)]
    for text in (
        "replica_groups={{0,4},{1,5},{2,6},{3,7}}, x",
        "replica_groups=[4,2]<=[2,4]T(1,0), x",
        "replica_groups=mesh['a'=2,'b'=4] {'a'}, x",
        "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, use_global_device_ids=true, x",
    ):
        assert replica_groups(text, 8) == along_the_first
    assert replica_groups("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}, x", 8) == [(0, 1, 4, 5), (2, 3, 6, 7)]
    assert replica_groups("replica_groups=[2,4]<=[8], x", 8) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert replica_groups("replica_groups={}, x", 3) == [(0, 1, 2)]
    with pytest.raises(ValueError, match="unknown form"):
        replica_groups("replica_groups=somehow", 8)


def test_axes_are_those_along_which_a_group_differs():
    mesh = {"data": 2, "fsdp": 1, "context": 4}
    assert axes_of([(0, 4), (1, 5)], mesh) == ("data",)
    assert axes_of([(2, 3)], mesh) == ("context",)
    assert axes_of([tuple(range(8))], mesh) == ("data", "context")


ASYNC = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inside (p: bf16[8,6]) -> bf16[2,6] {
  %p = bf16[8,6]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %scatter = bf16[2,6]{1,0} reduce-scatter(%p), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
}

%body (s: (s32[], bf16[2,6])) -> (s32[], bf16[2,6]) {
  %s = (s32[], bf16[2,6]) parameter(0)
  %x = bf16[2,6]{1,0} get-tuple-element(%s), index=1, metadata={op_name="jit(f)/transpose(jvp())/L0/halo/x"}
  %kernel = bf16[2,6]{1,0} custom-call(%x), custom_call_target="k", backend_config={"a": {
}}
  %start = (bf16[2,6], bf16[8,6]) all-gather-start(%kernel), replica_groups={{0,1,2,3}}, dimensions={0}
  %done = bf16[8,6]{1,0} all-gather-done(%start)
  %from = ((bf16[8,6]), bf16[2,6]) async-start(%done), calls=%inside
  %to = bf16[2,6]{1,0} async-done(%from), calls=%inside
  ROOT %out = (s32[], bf16[2,6]) tuple(%s, %to)
}

%condition (s: (s32[], bf16[2,6])) -> pred[] {
  %s = (s32[], bf16[2,6]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %most = s32[]{:T(128)} constant(7)
  ROOT %less = pred[] compare(%i, %most), direction=LT
}

ENTRY %main (p: (s32[], bf16[2,6])) -> (s32[], bf16[2,6]) {
  %p = (s32[], bf16[2,6]) parameter(0)
  ROOT %while = (s32[], bf16[2,6]) while(%p), condition=%condition, body=%body
}
"""


def test_a_start_and_its_done_are_one_and_a_loop_without_a_count_has_it_in_its_condition():
    gather, scatter = collectives(ASYNC, {"context": 4})
    assert (gather.kind, gather.bytes, gather.times, gather.types) == ("all-gather", 3 * 24, 7, ("bf16",))
    assert (scatter.kind, scatter.bytes, scatter.times) == ("reduce-scatter", 96 * 3 // 4, 7)
    assert gather.backward and "halo" in gather.scope, "the scope of the nearest operand that has one"


def test_an_unrolled_loop_has_as_many_iterations_as_its_counter_takes_to_the_constant():
    unrolled = """
%two (s: (f32[8], u32[])) -> (f32[8], u32[]) {
  %s = (f32[8], u32[]) parameter(0)
  %x = f32[8]{0} get-tuple-element(%s), index=0
  %i = u32[]{:T(128)} get-tuple-element(%s), index=1
  %sum = f32[8]{0} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add
  %step = u32[]{:T(128)} constant(3)
  %next = u32[]{:T(128)} add(%i, %step), metadata={op_name="loop"}
  ROOT %out = (f32[8], u32[]) tuple(%sum, %next)
}

%less (s: (f32[8], u32[])) -> pred[] {
  %s = (f32[8], /*index=5*/u32[]) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%s), index=1
  %most = u32[]{:T(128)} constant(8)
  ROOT %is = pred[] compare(%i, %most), direction=LT
}

ENTRY %main (p: (f32[8], u32[])) -> (f32[8], u32[]) {
  %p = (f32[8], u32[]) parameter(0)
  ROOT %while = (f32[8], u32[]) while(%p), condition=%less, body=%two
}
"""
    (sum_,) = collectives(unrolled, {"context": 4})
    assert (sum_.kind, sum_.times) == ("all-reduce", 3)  # 0, 3 and 6 are less than 8


def test_a_collective_is_hidden_if_the_schedule_computes_before_it_is_done():
    assert [x.hidden for x in collectives(ASYNC, {"context": 4})] == [False, False]
    between = '  %between = bf16[2,6] custom-call(%x), custom_call_target="k"'
    estimate = '  %between = bf16[2,6] copy(%x), backend_config={"estimated_cycles":"9"}'
    for line, before, hidden in (
        (between, "  %done = ", [True, False]),
        (estimate, "  %to = ", [False, True]),
        (estimate.replace("9", "0"), "  %to = ", [False, False]),
        (between, "  ROOT %out = ", [False, False]),
    ):
        text = ASYNC.replace(before, f"{line}\n{before}")
        assert [x.hidden for x in collectives(text, {"context": 4})] == hidden


def test_a_loop_of_unknown_length_with_a_collective_is_an_error():
    text = ASYNC.replace("constant(7)", "get-tuple-element(%s), index=0")
    with pytest.raises(ValueError, match="has an unknown number of iterations"):
        collectives(text, {"context": 4})
    for scope, times in (("iterations_5/while", 5), ("iterations_16/while/body/iterations_3/while", 3)):
        named = text.replace("body=%body", f'body=%body, metadata={{op_name="jit(f)/{scope}"}}')
        assert {x.times for x in collectives(named, {"context": 4})} == {times}  # of experts, or of an expert's blocks
    quiet = "\n".join(line for line in text.splitlines() if "-start" not in line and "-done" not in line)
    assert collectives(quiet, {"context": 4}) == []


def test_sizes_of_types():
    expected = [("f32", "2,3", 24), ("bf16", "5", 10), ("pred", "", 1), ("s4", "3", 2), ("f8e4m3fn", "2,2", 4)]
    assert arrays("(f32[2,3]{1,0}, bf16[5], pred[], s4[3], f8e4m3fn[2,2])") == expected
    assert arrays("token[]") == [("token", "", 0)]
    with pytest.raises(ValueError, match="no HLO text"):
        parse("nothing")


CHAIN = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%begin (p: bf16[8,6]) -> (bf16[8,6], u32[]) {
  %p = bf16[8,6] parameter(0)
  %all-reduce.1 = bf16[8,6] all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add, frontend_attributes={chain_id="0"}
  ROOT %custom-call.1 = (bf16[8,6], u32[]) custom-call(%all-reduce.1), custom_call_target="AsyncCollectiveStart"
}

%compute (q: bf16[8,6], x: bf16[6,6]) -> (bf16[8,6], bf16[8,6]) {
  %q = bf16[8,6] parameter(0)
  %x = bf16[6,6] parameter(1)
  %product = bf16[8,6] convolution(%q, %x), dim_labels=bf_io->bf
  %all-reduce.2 = bf16[8,6] all-reduce(%q), replica_groups={{0,1,2,3}}, to_apply=%add, frontend_attributes={chain_id="0"}
  ROOT %both = (bf16[8,6], bf16[8,6]) tuple(%product, %all-reduce.2)
}

%end (r: bf16[8,6]) -> bf16[8,6] {
  %r = bf16[8,6] parameter(0)
  %all-reduce.3 = bf16[8,6] all-reduce(%r), replica_groups={{0,1,2,3}}, to_apply=%add, frontend_attributes={chain_id="0"}
  ROOT %custom-call.2 = bf16[8,6] custom-call(%r, %all-reduce.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: bf16[8,6], x: bf16[6,6]) -> bf16[8,6] {
  %a = bf16[8,6] parameter(0)
  %x.1 = bf16[6,6] parameter(1)
  %start = (bf16[8,6], u32[]) fusion(%a), kind=kCustom, calls=%begin
  %part = bf16[8,6] get-tuple-element(%start), index=0
  %step = (bf16[8,6], bf16[8,6]) fusion(%part, %x.1), kind=kOutput, calls=%compute
  %rest = bf16[8,6] get-tuple-element(%step), index=1
  %summed = bf16[8,6] fusion(%rest), kind=kCustom, calls=%end
  ROOT %again = bf16[8,6] all-reduce(%summed), replica_groups={{0,1,2,3}}, to_apply=%add
}
"""


def test_a_collective_that_is_split_over_fusions_that_compute_counts_once_and_is_hidden():
    split, plain = collectives(CHAIN, {"context": 4})
    assert (split.kind, split.bytes, split.hidden) == ("all-reduce", 2 * 96 * 3 // 4, True)
    assert (plain.bytes, plain.hidden) == (split.bytes, False)
