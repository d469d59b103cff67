"""RULER (arXiv 2404.06654): thirteen tasks of retrieval, tracing, counting and questions at any length, and its scores."""

from hybrid_attn.evals.ruler.fit import generate, missing
from hybrid_attn.evals.ruler.tasks import NAMES

__all__ = ["NAMES", "generate", "missing"]
