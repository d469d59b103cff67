"""Generation and scoring: `Engine` reads prompts into caches that match the layers, and answers from them."""

from hybrid_attn.infer.engine import Engine, Generated, Timing

__all__ = ["Engine", "Generated", "Timing"]
