"""Configs of older versions of this program: the keys that they lack, and today's names of the keys that they have."""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping

from hybrid_attn import trees
from hybrid_attn.configs import base

# Keys that older configs lack: of the model, of the optimiser, of `train`, of a stage, of a layer type, of its feed-forward.
NEW_MODEL = "prefix", "mup_base_width", "mup_base_depth", "depth_init", "unembed_init_std", "adapter", "low_rank"
NEW_OPTIM = (
    "optimiser", "momentum", "moment_dtype", "independent_decay", "decay_shape",
    "ema_half_life", "spike_factor", "max_consecutive_spikes", "warmup_tokens", "rollback_steps",
    "low_rank_decay",
)  # fmt: skip
NEW_TRAIN = "overlap", "statistics_every", "sinks", "unroll", "moe_kernel", "rank_statistics"
NEW_STAGE = (
    "name", "objective", "model_changes", "lr_schedule", "override", "trainable", "tokens", "batch_ramp", "batch_ramp_tokens",
    "average_over", "preference", "turn_patience", "turn_indicator",
)  # fmt: skip
NEW_MLP = "bias_rate", "shared_d_ff", "domain_dim", "bias_on", "swiglu_limit", "swiglu_alpha", "biases"
NEW_KIND = "mixer", "attention_experts", "share_kv", "mlp", "residual_scale", "attention_bias", "short_conv"
RENAMED_CONTEXT = "exchange", "ulysses"  # its name in older configs and checkpoints, and today's


def completed(values: Mapping) -> dict:
    """The nested dict of a config; keys that older ones lack get their defaults, the only choice when those were written."""
    values, defaults = trees.plain(values), _defaults(base.get_config)
    model, stages = values.get("model"), values.get("stages")
    kinds = model.get("kinds") if isinstance(model, dict) else None
    _add([values], defaults, "init_from")
    _add([model], defaults["model"], *NEW_MODEL)
    _add([values.get("mesh")], defaults["mesh"], "expert")
    _add([values.get("optim")], defaults["optim"], *NEW_OPTIM)
    _add([values.get("train")], defaults["train"], *NEW_TRAIN)
    stages = [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    _add(stages, defaults["stages"][0], *NEW_STAGE)
    _add([stage["lr_schedule"] for stage in stages], _defaults(base.lr_schedule), "warmup_tokens")
    _add([stage["preference"] for stage in stages], _defaults(base.preference), "reference")
    kinds = [kind for kind in kinds.values() if isinstance(kind, dict)] if isinstance(kinds, dict) else []
    _add(kinds, _defaults(base.kind), *NEW_KIND)
    for kind in kinds:
        if isinstance(kind["mlp"], str):  # the type alone
            kind["mlp"] = trees.plain(base.moe(type=kind["mlp"]))
    _add([kind["mlp"] for kind in kinds], _defaults(base.moe), *NEW_MLP)
    _add([kind["rope_scaling"] for kind in kinds if "rope_scaling" in kind], _defaults(base.kind)["rope_scaling"], "truncate")
    return values


@functools.cache
def _defaults(group: Callable) -> dict:
    """The nested dict of a group of `base`, which `_add` copies from."""
    return trees.plain(group())


def _add(groups: Iterable, defaults: Mapping, *keys: str) -> None:
    """Adds those of the `keys` that a group lacks. `build` refuses what is no group."""
    for group in groups:
        if isinstance(group, dict):
            group |= {key: copy.deepcopy(defaults[key]) for key in keys if key not in group}


def upgraded(values: Mapping) -> dict:
    """The nested dict of a checkpoint's config with today's keys: `completed`, and with new names for old ones."""
    values = completed(values)
    train = values.get("train")
    if isinstance(train, dict) and "balance" in train:
        train["zigzag"] = train.pop("balance")
        train["context"] = train["context"].replace(*RENAMED_CONTEXT)
    return values
