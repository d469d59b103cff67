"""Every key of a config, with its default: hybrid_attn/configs/base.py, which an installed package has too."""

from hybrid_attn.configs.base import adapter, get_config, kind, low_rank, lr_schedule, moe, override, preference, source, stage

__all__ = ["adapter", "get_config", "kind", "low_rank", "lr_schedule", "moe", "override", "preference", "source", "stage"]
