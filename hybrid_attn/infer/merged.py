"""The parameters of a checkpoint with an adapter or factors, as those of a model of matrices alone, period by period."""

import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from hybrid_attn import checkpoint
from hybrid_attn.config import Model
from hybrid_attn.model import abstract_params, specs, transforms
from hybrid_attn.model.transforms.low_rank import U, V
from hybrid_attn.trees import check


def of_matrices(model: Model) -> Model:
    """The model whose parameters `Merged` reads; ValueError for an adapter that no matrices can hold."""
    name, mergeable = model.adapter.type, [name for name, x in transforms.TRANSFORMS.items() if x.merged is not None]
    problem = f"an adapter of model.adapter.type={name!r} depends on the token, and no matrix has the same products"
    check(name is None or name in mergeable, f"{problem}; {' and '.join(mergeable)} can be merged")
    return transforms.dense(model)


class Merged(NamedTuple):
    """Reads the parameters of the checkpoint of a step of `model`, which may have an adapter or factors."""

    directory: str | os.PathLike
    step: int
    model: Model

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter, by name, in the order of the names."""
        return _shapes(of_matrices(self.model))

    def slices(self, name: str) -> Iterator[np.ndarray]:
        """The periods of a stacked parameter, or all of an unstacked one, as `checkpoint.read_slices` yields them."""
        shapes = _shapes(self.model)
        if name not in shapes:
            u, v = (self._read(f"{name}/{factor}", shapes) for factor in (U, V))
            yield from (np.tensordot(*pair, 1) for pair in zip(u, v, strict=True))
            return
        group, model = f"{name}{transforms.SUFFIX}/", self.model
        added = {path.removeprefix(group): self._read(path, shapes) for path in shapes if path.startswith(group)}
        if not added:
            yield from self._read(name, shapes)
            return
        spec, merged = _flat(specs(model))[name], transforms.transform_of(model.adapter).merged
        for weight, *others in zip(self._read(name, shapes), *added.values(), strict=True):
            yield merged(model.adapter, spec, weight, dict(zip(added, others, strict=True)))

    def targets(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the matrices that have an adapter, by name."""
        shapes = _shapes(self.model)
        added = {name.rpartition("/")[0].removesuffix(transforms.SUFFIX) for name in shapes if transforms.is_added(name)}
        return {name: shapes[name] for name in sorted(added)}

    def added(self, name: str, part: str) -> Iterator[np.ndarray]:
        """The periods of one of the weights beside a matrix, as `slices` yields them."""
        path = f"{name}{transforms.SUFFIX}/{part}"
        return self._read(path, _shapes(self.model))

    def _read(self, name: str, shapes: dict[str, tuple[int, ...]]) -> Iterator[np.ndarray]:
        return checkpoint.read_slices(self.directory, name, shapes[name], self.step)


@functools.cache
def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Of every parameter, by name; traced once, and not for each parameter that is read."""
    return {name: x.shape for name, x in _flat(abstract_params(model)).items()}


def _flat(tree: dict) -> dict:
    return dict(sorted(flatten_dict(tree, sep="/").items()))
