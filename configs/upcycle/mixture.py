"""A mixture of experts that goes on from one of tools/upcycle.py, made of the seed and three branches of dense.py.

    python launch/train.py --config=configs/upcycle/mixture.py:tiny,bam --config.init_from.path=runs/start --workdir=runs/bam

The methods are sparse, of 4 experts, btx, bam, nexus, and linear: nexus with --router=linear. Those of EXTENDED have, as
nexus_extended, the expert that --add_expert adds; half of their tokens are of its domain, as in arXiv 2408.15901.
"""

from ml_collections import ConfigDict

from configs.upcycle import dense
from hybrid_attn import trees, upcycle
from hybrid_attn.configs import base

MODELS = 4  # the seed and a branch of each of its domains
EXTENDED = "btx", "nexus", "linear"
METHODS = (*upcycle.METHODS, "linear", *(f"{name}_extended" for name in EXTENDED))


def get_config(argument: str = "tiny,btx"):
    size, method = dense.split(argument, METHODS)
    c = base.get_config()
    dense.of_size(c, size)
    name = method.removesuffix("_extended")
    recipe = upcycle.METHODS["nexus" if name == "linear" else name](1 if name == "sparse" else MODELS, MODELS)
    values = trees.plain({"model": c.model})
    values = upcycle.mixture(values, recipe, {"domain_dim": c.model.d_model} if name == "nexus" else {})
    if method == name:
        dense.training(c, size, 2, dense.SEED)
    else:
        values = upcycle.extended(values)
        dense.training(c, size, 2, (*dense.SEED, dense.ADDED))
        c.stages[0].mixture[dense.ADDED] = float(len(dense.SEED))
    c.model = ConfigDict(values["model"])
    if size == "tiny":
        c.optim.lr /= 2
    else:
        c.optim.lr, c.optim.warmup_steps = 1e-4, 1000  # without a warm-up its loss has spikes
    return c
