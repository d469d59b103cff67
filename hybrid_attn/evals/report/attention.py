"""Pictures of where attention goes, by layer, by position and by head."""

import math
from collections.abc import Sequence

import numpy as np

from hybrid_attn.evals.report import contents, pictures
from hybrid_attn.evals.report.canvas import Picture
from hybrid_attn.evals.report.runs import Run
from hybrid_attn.evals.report.tables import plain, tokens


def drawn(runs: Sequence[Run]) -> list[Picture]:
    """Of every run, source and length; single heads and positions at the longest."""
    found, kinds = [], sorted({r["kind"] for run in runs for r in run.of("attention_mass")})
    for number, run in enumerate(runs):
        for source in dict.fromkeys(r["source"] for r in run.of("attention_mass")):
            every = [r for r in run.of("attention_mass") if r["source"] == source]
            longest = contents.lengths_of(every)[-1]
            for length in contents.lengths_of(every):
                name, where = f"attention_{number}_{plain(source)}_{length}", f"{run.name}, {source}, {tokens(length)}"
                found += _of_source(name, where, [r for r in every if r["length"] == length], kinds, length == longest)
    return found


def _of_source(name: str, where: str, records: Sequence[dict], kinds: Sequence[str], by_head: bool) -> list[Picture]:
    """Of one source at one length; `kinds` are those of all runs."""
    length = records[0]["length"]
    by_layer = {layer: [r for r in records if r["layer"] == layer] for layer in sorted({r["layer"] for r in records})}
    layers = [
        (layer, rs[0]["kind"], rs[0]["reach"], {x: contents.mean_of(rs, x) for x in pictures.SEGMENTS})
        for layer, rs in by_layer.items()
    ]
    found = [Picture(name, f"{where}: where the question looks, by layer.", pictures.attention_by_layer(layers), False)]
    if not by_head:
        return found
    if all("weights" in r for r in records):
        figure = pictures.weight_by_position(_weights(records), records[0]["edges"], length, kinds)
        found.append(Picture(f"{name}_weights", f"{where}: the weight of a key by its position.", figure, False))
    for field, label, most in (("retrieval", "retrieval score", 1.0), ("entropy_bits", "entropy (bits)", math.log2(length))):
        figure = pictures.heads(_grid(by_layer, field), [f"{layer} {kind}" for layer, kind, *_ in layers], most, label)
        found.append(Picture(f"{name}_{field}", f"{where}: {label} of each head.", figure, False))
    return found


def _weights(records: Sequence[dict]) -> dict[str, np.ndarray]:
    """Mean weights of keys between neighbouring edges, over the heads of each kind of layer."""
    kinds = sorted({r["kind"] for r in records})
    return {kind: np.mean(np.array([r["weights"] for r in records if r["kind"] == kind], float), axis=0) for kind in kinds}


def _grid(by_layer: dict[int, list[dict]], field: str) -> np.ndarray:
    """Layers down, heads across; NaN where there is no number."""
    grid = np.full((len(by_layer), 1 + max(r["head"] for rs in by_layer.values() for r in rs)), math.nan)
    for row, records in enumerate(by_layer.values()):
        for r in records:
            known = r[field] is not None and (r["reach"] or field == "entropy_bits")
            grid[row, r["head"]] = r[field] if known else math.nan
    return grid
