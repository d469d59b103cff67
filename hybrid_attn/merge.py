"""Merges of models: from the same tensor of several models, the tensor of a new one.

All arithmetic is in float64, so a mean of equal models is the model itself, bit for bit. A tensor is a weight of one layer.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from hybrid_attn.trees import check

PARALLEL = 0.9995  # cosine from which the arc between two tensors is a line, as in mergekit

# The learning rate after a share of the decay, over the rate before it.
DECAYS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "linear": lambda share: 1 - share,
    "sqrt": lambda share: 1 - np.sqrt(share),
    "cosine": lambda share: (1 + np.cos(np.pi * share)) / 2,
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How models are merged; each method reads the fields that its docstring names."""

    method: str
    weights: tuple[float, ...]
    t: float = 0.5
    density: float = 0.5
    scale: float = 1.0
    seed: int = 0

    def __post_init__(self):
        least, most, number = *METHODS[self.method][:2], len(self.weights)
        count = f"{least}" if least == most else f"{least} or more"
        check(least <= number and (most is None or number <= most), f"{self.method} merges {count} models, not {number}")
        check(all(np.isfinite(self.weights)), f"weights={self.weights} must be finite numbers")
        check(abs(sum(self.weights)) > 1e-6, f"weights={self.weights} sum to {sum(self.weights):g}; use others")
        check(0 <= self.t <= 1, f"t={self.t} must lie between 0, the first model, and 1, the second")
        check(0 < self.density <= 1, f"density={self.density} must lie above 0, and at most at 1")


def decay_weights(decay: str, number: int) -> tuple[float, ...]:
    """Weights of `number` checkpoints of a stable phase, oldest first, that stand for a decay of the learning rate (WSM).

    An update counts with the sum of the weights of the checkpoints after it (arXiv 2507.17634). This sum is the rate that the
    decay has at the first of them, over the rate before the decay. A linear decay gives equal weights.
    """
    share = np.arange(number + 1) / number
    rate = DECAYS[decay](share)
    return tuple(float(x) for x in rate[:-1] - rate[1:])


def linear(tensors: Sequence[np.ndarray], recipe: Recipe, **_) -> np.ndarray:
    """The mean by `weights`."""
    return _weighted(recipe.weights, tensors) / sum(recipe.weights)


def slerp(tensors: Sequence[np.ndarray], recipe: Recipe, **_) -> np.ndarray:
    """The point at share `t` of the arc from the first tensor to the second (Shoemake 1985), without normalising either."""
    first, second = tensors
    norms = np.linalg.norm(first) * np.linalg.norm(second)
    cosine = np.clip(np.sum(first * second) / norms, -1, 1) if norms else 1.0
    t = recipe.t
    if abs(cosine) > PARALLEL:
        return (1 - t) * first + t * second
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * first + np.sin(t * angle) * second) / np.sin(angle)


def ties(tensors: Sequence[np.ndarray], recipe: Recipe, base: np.ndarray, **_) -> np.ndarray:
    """`base` and `scale` times the merged differences from it (TIES, arXiv 2306.01708).

    Each difference keeps its largest values, a share `density`. The sign of the sum by `weights` is elected, and those
    differences that agree with it are averaged.
    """
    differences = [_largest(x - base, recipe.density) for x in tensors]
    sign = np.sign(_weighted(recipe.weights, differences))
    agreeing = [weight * (np.sign(x) == sign) * (sign != 0) for weight, x in zip(recipe.weights, differences, strict=True)]
    total, merged = sum(agreeing), _weighted(agreeing, differences)
    return base + recipe.scale * np.divide(merged, total, out=np.zeros_like(merged), where=total != 0)


def dare(tensors: Sequence[np.ndarray], recipe: Recipe, base: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`base` and `scale` times the mean by `weights` of the differences from it, each thinned out (DARE, arXiv 2311.03099).

    Every value of a difference is kept with probability `density`, and divided by it.
    """
    differences = [(x - base) * (rng.random(x.shape) < recipe.density) / recipe.density for x in tensors]
    return base + recipe.scale * _weighted(recipe.weights, differences) / sum(recipe.weights)


class Method(NamedTuple):
    """The fewest and the most models, whether the merge needs a base, and the function of one tensor."""

    least: int
    most: int | None
    has_base: bool
    function: Callable[..., np.ndarray]


METHODS = {
    "linear": Method(1, None, False, linear),
    "slerp": Method(2, 2, False, slerp),
    "ties": Method(1, None, True, ties),
    "dare": Method(1, None, True, dare),
}


def merge(
    recipe: Recipe, tensors: Sequence[np.ndarray], base: np.ndarray | None, rng: np.random.Generator | None
) -> np.ndarray:
    """The merged tensor, in the dtype of the first one; `rng` draws what DARE drops, and no other method."""
    dtype, wide = tensors[0].dtype, [x.astype(np.float64) for x in tensors]
    extra = {"base": base.astype(np.float64), "rng": rng} if METHODS[recipe.method].has_base else {}
    return METHODS[recipe.method].function(wide, recipe, **extra).astype(dtype)


def _weighted(weights: Sequence, tensors: Sequence[np.ndarray]) -> np.ndarray:
    return sum(weight * x for weight, x in zip(weights, tensors, strict=True))


def _largest(x: np.ndarray, density: float) -> np.ndarray:
    """`x` with zeros for all but its largest values, a share `density` of them and at least one."""
    count = max(round(density * x.size), 1)
    order = np.argpartition(np.abs(x), x.size - count, axis=None)[x.size - count :]
    y = np.zeros(x.size)
    y[order] = x.reshape(-1)[order]
    return y.reshape(x.shape)
