"""The kernels of a layer are read from the text of a program that was compiled for a GPU."""

from hybrid_attn.plan import kernels

SCOPE = 'metadata={op_name="jit(step)/%s"}'
TRITON = 'custom_call_target="__gpu$xla.gpu.triton"'
FORWARD, BACKWARD = "jvp()/while/body/closed_call/L/L0/", "transpose(jvp())/while/body/closed_call/L/L0/L/L0/checkpoint/"
OUTER = 'while(%p), condition=%cond, body=%layers, backend_config={"known_trip_count":{"n":"8"}}'
INNER = 'while(%p), condition=%cond, body=%search, backend_config={"known_trip_count":{"n":"14"}}'
TEXT = f"""HloModule step

%product (p: f32[4]) -> bf16[64,8] {{
  %p = f32[4] parameter(0)
  ROOT %d = bf16[64,8] dot(%p, %p)
}}

%cond (p: f32[4]) -> pred[] {{
  ROOT %c = pred[] compare(%p, %p)
}}

%search (p: f32[4]) -> f32[4] {{
  ROOT %s = f32[4] add(%p, %p), {SCOPE % (BACKWARD + "while/body/add")}
}}

%even (p: f32[4]) -> f32[4] {{
  ROOT %s = f32[4] custom-call(%p), custom_call_target="even", {SCOPE % (FORWARD + "even")}
}}

%odd (p: f32[4]) -> () {{
  ROOT %s = () custom-call(%p), custom_call_target="odd", {SCOPE % (FORWARD + "odd")}
}}

%layers (p: f32[4]) -> f32[4] {{
  %q = f32[4] conditional(%p), branch_computations={{%even, %odd}}
  %a = (bf16[2,3], f32[2]) custom-call(%p), custom_call_target="mosaic_gpu_v2", {SCOPE % (FORWARD + "tokamax:x/call")}
  %b = bf16[64,8] fusion(%p), kind=kCustom, calls=%product, {SCOPE % (BACKWARD + "rematted_computation/dot_general")}, "gemm"
  %e = bf16[6] copy(%p), {SCOPE % (BACKWARD + "key gradients/transpose")}
  %i = f32[4] {INNER}, {SCOPE % (BACKWARD + "while")}
  ROOT %t = f32[4] custom-call(%p), {TRITON}, {SCOPE % (BACKWARD + "key gradients/pallas_call")}
}}

ENTRY %main (p: f32[4]) -> f32[4] {{
  %loss = f32[9] copy(%p), {SCOPE % "jvp()/loss"}
  ROOT %w = f32[4] {OUTER}, {SCOPE % "jvp()/while"}
}}
"""


def test_a_kernel_counts_as_often_as_the_loops_turn_that_it_is_in():
    assert [tuple(x) for x in kernels.launches(TEXT)] == [
        ("L0", "forward", "even", "even", "f32[4]", 16, 8),  # both branches of a conditional count
        ("L0", "forward", "odd", "odd", "nothing[]", 0, 8),
        ("L0", "forward", "Mosaic", "tokamax attention", "bf16[2,3]", 20, 8),
        ("L0", "recomputed", "matrix product", "dot_general", "bf16[64,8]", 1024, 8),
        ("L0", "backward", "copy", "key gradients/transpose", "bf16[6]", 12, 8),
        ("L0", "backward", "add", "while/body/add", "f32[4]", 16, 8 * 14),
        ("L0", "backward", "Triton", "key gradients", "f32[4]", 16, 8),
    ]


def test_the_report_adds_up_the_launches_of_each_pass():
    report = kernels.report(TEXT).splitlines()
    assert report[-1].split() == ["|", "L0", "|", "backward", "|", "128", "|"]
    assert any("key gradients" in line and "Triton" in line for line in report)
