"""How the initial value and the learning rate of a weight depend on the width and the depth of the model.

µP, the maximal update parametrisation (arXiv 2203.03466, table 8): let m be the width over that of the base model. The initial
standard deviation of a matrix that sums over the width is 1 / sqrt(m) of that in the base model, its learning rate under Adam
1 / m. Logits are multiplied by 1 / m (`config.output_scale`). All else stays. Rates and initial values that are good for the
base model are then good for every width. Feed-forwards and the number of heads grow with the width; the size of a head stays,
and with it the scale of the scores.

Depth: with l the number of layers over that of the base model, a branch adds 1 / l of its output to the residual stream
(CompleteP, arXiv 2505.01618, alpha = 1). The factor stands in the matrices that write to it: their initial values and their
rate are 1 / l of those of the base model, which is the same under Adam. So parameters compute the same function without it.
"""

import dataclasses

from hybrid_attn.config import Model
from hybrid_attn.model.params import ParamSpec, Weight


def with_multipliers(model: Model, spec: ParamSpec) -> ParamSpec:
    """The spec of a weight of `model` with the width, the depth and the standard deviation that it has there.

    With `depth_init`, matrices that write to the residual stream start at 1 / sqrt(2 layers) (GPT-2): there are two in a layer.
    """
    width = model.d_model / model.mup_base_width if model.mup_base_width and spec.reads_width else 1.0
    depth = model.num_layers / model.mup_base_depth if model.mup_base_depth and spec.writes_residual else 1.0
    branches = 2 * model.num_layers if model.depth_init and spec.writes_residual else 1
    return dataclasses.replace(spec, std=spec.std / (depth * (width * branches) ** 0.5), width=width, depth=depth)


def parametrised(model: Model, weight: Weight) -> Weight:
    """`weight`, drawn as its layer declares it, with the initial value and the spec that it has in `model`."""
    spec = with_multipliers(model, weight.spec)
    factor = spec.std / weight.spec.std if weight.spec.std else 1.0
    return weight if spec == weight.spec else Weight(factor * weight[...], spec=spec)
