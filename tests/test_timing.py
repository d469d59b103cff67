"""The time of a program compiled for TPUs is the sum of its compiler's estimates, and kernels that have none are counted."""

import pytest
from conftest import tiny

from hybrid_attn.model import flops
from hybrid_attn.plan import timing

ESTIMATE = 'backend_config={"window_config":{"estimated_cycles":"%d","iteration_bounds":["1"]}}'
PROGRAM = f"""HloModule m

%fused (p: f32[8]) -> f32[8] {{
  %p = f32[8] parameter(0)
  ROOT %twice = f32[8] add(%p, %p), {ESTIMATE % 1000}
}}

%inner (s: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %s = (s32[], f32[8]) parameter(0)
  ROOT %step = (s32[], f32[8]) fusion(%s), kind=kLoop, calls=%fused, {ESTIMATE % 7}
}}

%outer (s: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %s.1 = (s32[], f32[8]) parameter(0)
  %copy = (s32[], f32[8]) copy(%s.1), {ESTIMATE % 50}
  ROOT %loop = (s32[], f32[8]) while(%copy), condition=%five, body=%inner
}}

%three (s: (s32[], f32[8])) -> pred[] {{
  %limit = s32[] constant(3)
}}

%five (s: (s32[], f32[8])) -> pred[] {{
  %limit.1 = s32[] constant(5)
}}

%short (x: f32[8]) -> f32[8] {{
  ROOT %a = f32[8] fusion(%x), kind=kLoop, calls=%fused, {ESTIMATE % 11}
}}

%long (x: f32[8]) -> f32[8] {{
  ROOT %b = f32[8] fusion(%x), kind=kLoop, calls=%fused, {ESTIMATE % 13}
}}

ENTRY %main (a: f32[8]) -> f32[8] {{
  %a.1 = f32[8] parameter(0)
  %all = f32[32] all-gather(%a.1), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}
  %while = (s32[], f32[8]) while(%a.1), condition=%three, body=%outer
  ROOT %either = f32[8] conditional(%a.1), branch_computations={{%short, %long}}
}}
"""


def test_cycles_multiply_with_iterations_and_a_fusion_counts_as_a_whole():
    assert timing.cycles(PROGRAM) == 3 * (50 + 5 * 7) + 13


def test_a_loop_that_takes_time_needs_a_known_length_and_another_does_not():
    unknown = PROGRAM.replace("constant(5)", "parameter(0)")
    with pytest.raises(ValueError, match="the loop loop has an unknown number of iterations"):
        timing.cycles(unknown)
    assert timing.cycles(unknown.replace('"estimated_cycles":"7"', "")) == 3 * 50 + 13


def test_attention_kernels_run_again_where_the_layer_is_recomputed():
    c, length = tiny({"train.remat": "L=layer,G=attention"}), 96
    of_layer = {}
    for letter in "LG":
        layers = [x for x in c.model.layers if x == letter]
        mixer = timing.MIXERS[c.model.kinds[letter].mixer]
        of_layer[letter] = len(layers) * mixer.sequence_flops(c.model, c.model.kinds[letter], length)
    assert of_layer["L"] and of_layer["G"]
    # Two products forward; backward three for dq and four for dk and dv.
    expected = of_layer["L"] * (2 + 2 + 7) / 2 + of_layer["G"] * (2 + 7) / 2
    assert timing.kernel_flops(c.model, c.train, length) == expected
    assert of_layer["L"] + of_layer["G"] < flops.forward_flops_per_token(c.model, length) * length


def test_kernels_of_experts_have_three_products_forward_and_eight_backward_of_the_experts_of_a_token():
    mlp = {"mlp.type": "moe", "mlp.experts": 6, "mlp.top_k": 2, "mlp.shared_experts": 1}
    c = tiny({"model.pattern": "LLG", "model.num_layers": 7, "model.prefix": "L"}, L=mlp | {"mlp.d_ff": 24}, G=mlp)
    product = {letter: 2 * 2 * c.model.d_model * width for letter, width in (("L", 24), ("G", c.model.d_ff))}
    assert timing.expert_flops(c.model, {"L"}) == pytest.approx((3 + 8) * 5 * product["L"])
    assert timing.expert_flops(c.model, {"L", "G"}) == pytest.approx((3 + 8) * (5 * product["L"] + 2 * product["G"]))
    assert timing.expert_flops(c.model, set()) == 0
