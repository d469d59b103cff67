"""Pictures of evaluation records, drawn with matplotlib (the extra `eval`)."""

from collections.abc import Sequence

from matplotlib.figure import Figure


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
