"""tokamax's products of experts compile for an H100, in a whole step of training: `tests/test_aot.py` says how."""

import json
from collections import Counter

import pytest
from test_aot import GB, compiled, skip_reason

TARGET = "h100:1"
LAYERS = "L0", "L1", "L2", "G3"
MOST = 3.3  # GB at the peak, about a tenth above what was measured


def report() -> dict:
    """Of `configs/moe.py:150m` with one period of layers, over one sequence of 8,192 tokens."""
    if reason := skip_reason(TARGET):
        pytest.skip(reason)
    return compiled(program=__file__)[TARGET]


def test_a_step_on_an_h100_fits_beside_copies_by_the_width_of_an_expert():
    assert report()["peak"] <= MOST * GB


def test_a_layer_on_an_h100_has_eight_products_and_three_sums_of_experts_and_repeats_none():
    each = {
        ("forward", "Mosaic", "products of experts"): 3,
        ("backward", "Mosaic", "products of experts"): 5,  # gate and up again, and the gradients of rows
        ("backward", "Triton", "sums of experts"): 3,
    }
    counts = Counter(tuple(launch) for launch in report()["launches"])
    assert counts == {(layer, *key): number for layer in LAYERS for key, number in each.items()}


def main() -> None:
    """Plans the step and prints a line of JSON: its peak, and the kernels of experts by layer and pass."""
    from configs import moe
    from hybrid_attn import config
    from hybrid_attn.plan import kernels, targets
    from hybrid_attn.plan import step as plan

    c = moe.get_config("150m")
    c.model.num_layers = len(LAYERS)
    c.stages[0].batch = 1
    found = plan.make_plan(config.build(c), targets.find_target(TARGET))
    launched = [x for x in kernels.launches(found.text) if x.kernel in ("Mosaic", "Triton") and x.scope.endswith("of experts")]
    names = [(x.layer, x.which_pass, x.kernel, x.scope) for x in launched]
    print(json.dumps({"case": TARGET, "peak": found.peak, "launches": names}))


if __name__ == "__main__":
    main()
