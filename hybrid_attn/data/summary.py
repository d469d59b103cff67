"""The summary of a store: counted while it is prepared, stored in its manifest, printed by the tools."""

from collections.abc import Iterator

import numpy as np

from hybrid_attn import characters


def counts(columns: dict[str, np.ndarray], labels: int) -> dict[str, np.ndarray]:
    """Documents, tokens and bytes by label, and documents by length, of a shard with these `parts.COLUMNS`."""
    weights = {"documents": None, "tokens": columns["lengths"], "bytes": columns["bytes"]}
    by_label = {what: np.bincount(columns["labels"], weight, labels).astype(np.int64) for what, weight in weights.items()}
    # A length of [2^(k - 1), 2^k) has the exponent k.
    return by_label | {"lengths": np.bincount(np.frexp(columns["lengths"])[1], minlength=64)}


def summary(shards: list[dict], parts: list[dict], names: list[str]) -> dict:
    """The summary of a store, from the `counts` of its shards, its `parts`, and the `names` of its labels."""
    total = {what: sum(shard[what] for shard in shards) for what in shards[0]}
    by_label = {what: total[what] for what in ("documents", "tokens", "bytes")}
    trained = {"trained_tokens": total["trained_tokens"]} if "trained_tokens" in total else {}
    return {
        **{what: int(values.sum()) for what, values in by_label.items()},
        **trained,
        "skipped": skipped(parts) | {"duplicates": total["duplicates"]},
        "lengths": {str(2 ** (k - 1)): int(count) for k, count in enumerate(total["lengths"]) if count},
        "labels": {name: {what: int(values[i]) for what, values in by_label.items()} for i, name in enumerate(names)},
    }


def skipped(parts: list[dict]) -> dict[str, int]:
    return {what: sum(part["skipped"].get(what, 0) for part in parts) for what in ("broken", "empty", "binary")}


def lines(summary: dict) -> list[str]:
    """The lines of a summary, for printing; ValueError if it is damaged."""
    try:
        return [characters.line(line) for line in _lines(summary)]
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the summary in the manifest is damaged: {error!r}; prepare the store again") from error


def _lines(summary: dict) -> Iterator[str]:
    yield f"documents    {summary['documents']:,}, of {summary['bytes']:,} bytes"
    yield f"tokens       {summary['tokens']:,}, {_ratio(summary):.3f} bytes each, BOS and EOS included"
    if "trained_tokens" in summary:
        trained = summary["trained_tokens"]
        yield f"loss mask    {trained:,} tokens are trained on ({trained / summary['tokens']:.1%})"
    yield f"skipped      {', '.join(f'{count:,} {what}' for what, count in summary['skipped'].items())}"
    for label, values in summary["labels"].items():
        share = values["tokens"] / summary["tokens"]
        yield (
            f"label        {label}: {values['documents']:,} documents, {values['tokens']:,} tokens ({share:.1%}), "
            f"{_ratio(values):.3f} bytes each"
        )
    most = max(summary["lengths"].values())
    for first, count in summary["lengths"].items():
        bar = "#" * min(40, -(-40 * count // most))
        yield f"length       {f'{int(first):,} to {2 * int(first) - 1:,}':>27}  {count:>11,}  {bar}"


def _ratio(values: dict) -> float:
    return values["bytes"] / max(1, values["tokens"])  # 0 tokens if all documents of a label were copies of others
