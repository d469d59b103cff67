"""Every key of a config, with its default: hybrid_attn/configs/base.py, which an installed package has too."""

from hybrid_attn.configs.base import get_config, kind, lr_schedule, moe, override, preference, source, stage

__all__ = ["get_config", "kind", "lr_schedule", "moe", "override", "preference", "source", "stage"]
