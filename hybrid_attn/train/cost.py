"""What a step of a stage costs by the token, in FLOPs: `flops` for what the stage trains and its objective computes."""

from flax.traverse_util import flatten_dict

from hybrid_attn.config import StageConfig
from hybrid_attn.model import flops, specs
from hybrid_attn.train.objectives import objective_of
from hybrid_attn.train.trainable import is_trained


def flops_per_token(stage: StageConfig) -> float:
    """Three forward passes, less the gradients of matrices that do not train, plus the objective's other forward passes.

    Gradients of activations are counted in all layers, also below the first that trains.
    """
    other_passes = objective_of(stage).forward_passes * flops.forward_flops_per_token(stage.model, stage.seq_len)
    fixed = flops.product_flops_per_token(stage.model, _fixed(stage))
    return flops.train_flops_per_token(stage.model, stage.seq_len) - fixed + other_passes


def described(stage: StageConfig) -> str:
    """What `flops_per_token` counts, in a few words."""
    passes = objective_of(stage).forward_passes
    others = f" and {passes} x forward of other parameters" if passes else ""
    return f"{flops.TRAIN} x forward{', without gradients of fixed weights' if _fixed(stage) else ''}{others}"


def _fixed(stage: StageConfig) -> set[str]:
    """The names of the parameters that the stage does not train."""
    return {name for name, trains in flatten_dict(is_trained(stage, specs(stage.model)), sep="/").items() if not trains}
