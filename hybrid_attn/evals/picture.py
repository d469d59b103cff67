"""Pictures of evaluation records, drawn with matplotlib (the extra `eval`)."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SEGMENTS = {  # what they are called, and colours that colour-blind eyes tell apart (Okabe and Ito)
    "begin": ("first tokens", "#999999"),
    "needle": ("needle", "#D55E00"),
    "context": ("the rest", "#56B4E9"),
    "qc": ("question and answer", "#0072B2"),
    "nothing": ("no token", "#F0F0F0"),
}


def loss_by_position(records: Sequence[dict], trained_length: int) -> Figure:
    """The buckets that `position.run` yields, a line for each length, with a mark at the length of training."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    buckets = [record for record in records if "first" in record and "part" not in record]
    for length in sorted({record["length"] for record in buckets}):
        line = [record for record in buckets if record["length"] == length]
        edges = [max(record["first"], 1) for record in line] + [line[-1]["end"]]
        axes.stairs([record["loss"] for record in line], edges, baseline=None, label=f"rows of {length:,}", linewidth=1.5)
    axes.axvline(trained_length, color="grey", linestyle=":", label=f"trained at {trained_length:,}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("position in the document (tokens)")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def attention_mass(records: Sequence[dict]) -> Figure:
    """The heads of one length that `attention.run` yields: shares by layer, the needle's lift by head, weight by position."""
    layers = [[r for r in records if r["layer"] == layer] for layer in sorted({r["layer"] for r in records})]
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    shares, lifts, weights = figure.subplots(1, 3)
    _shares(shares, layers)
    _lifts(figure, lifts, layers)
    _weights(weights, layers)
    for axes in (shares, weights):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"where a question looks, {records[0]['length']:,} tokens")
    return figure


def _name(heads: Sequence[dict]) -> str:
    return f"{heads[0]['layer']} {heads[0]['kind']}"


def _shares(axes: Axes, layers: Sequence[Sequence[dict]]) -> None:
    """Stacked bars, means over heads; a cross stands over layers whose window does not reach the needle."""
    bottom = np.zeros(len(layers))
    for segment, (label, colour) in SEGMENTS.items():
        heights = np.array([np.mean([head.get(segment, 0.0) for head in heads]) for heads in layers])
        if segment != "nothing" or heights.any():
            axes.bar(range(len(layers)), heights, 0.8, bottom, label=label, color=colour)
        bottom += heights
    far = [i for i, heads in enumerate(layers) if not heads[0]["reach"]]
    if far:
        axes.plot(far, [1.03] * len(far), "x", color="black", markersize=5, clip_on=False, label="needle out of reach")
    every = -(-len(layers) // 12)
    axes.set_xticks(range(0, len(layers), every), [_name(heads) for heads in layers[::every]])
    axes.set_ylim(0, 1)
    axes.set_xlabel("layer and its kind")
    axes.set_ylabel("share of attention")
    axes.legend(frameon=False, fontsize="small", ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.02))


def _lifts(figure: Figure, axes: Axes, layers: Sequence[Sequence[dict]]) -> None:
    """A heat map of layers down and heads across, on a logarithmic scale round 1; grey: the needle has no share."""
    lifts = np.array([[head["needle_lift"] for head in heads] for heads in layers])
    logs = np.log10(np.where(lifts > 0, lifts, np.nan))
    most = max(1.0, float(np.nanmax(np.abs(logs), initial=0.0)))
    axes.set_facecolor("#CCCCCC")
    image = axes.imshow(logs, cmap="PuOr_r", vmin=-most, vmax=most, aspect="auto", interpolation="none")
    every = -(-len(layers) // 12)
    axes.set_yticks(range(0, len(layers), every), [_name(heads) for heads in layers[::every]])
    axes.set_xlabel("head")
    axes.set_ylabel("layer and its kind")
    figure.colorbar(image, ax=axes, label="needle's lift (powers of ten)")


def _weights(axes: Axes, layers: Sequence[Sequence[dict]]) -> None:
    """A line for each layer, the mean over its heads, in the colour of its kind; and equal shares of all tokens."""
    kinds = sorted({heads[0]["kind"] for heads in layers})
    for heads in layers:
        number = kinds.index(heads[0]["kind"])
        first = heads is next(x for x in layers if x[0]["kind"] == heads[0]["kind"])
        weights = np.mean([head["weights"] for head in heads], 0)
        axes.stairs(
            np.where(weights > 0, weights, np.nan), heads[0]["edges"], baseline=None, color=f"C{number}", alpha=0.7,
            label=heads[0]["kind"] if first else None,
        )  # fmt: skip
    axes.axhline(1 / layers[0][0]["length"], color="grey", linestyle=":", label="all alike")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("position of the key (tokens)")
    axes.set_ylabel("mean weight of a key")
    axes.legend(frameon=False, fontsize="small")
