"""The summary of a store: counted while it is prepared, stored in its manifest, printed by the tools."""

from collections.abc import Iterator

from hybrid_attn import characters


def summary(counts: list[dict], parts: list[dict], names: list[str]) -> dict:
    """The summary of a store, from the `counts` of its shards, its `parts`, and the `names` of its labels."""
    duplicates = sum(x["duplicates"] for x in counts)
    by_label = {what: sum(x["labels"][what] for x in counts) for what in ("documents", "tokens", "bytes")}
    lengths = sum(x["lengths"] for x in counts)
    trained = {"trained_tokens": sum(x["trained_tokens"] for x in counts)} if "trained_tokens" in counts[0] else {}
    return {
        **{what: int(values.sum()) for what, values in by_label.items()},
        **trained,
        "skipped": skipped(parts) | {"duplicates": duplicates},
        # A length of [2^(k - 1), 2^k) has the exponent k.
        "lengths": {str(2 ** (k - 1)): int(count) for k, count in enumerate(lengths) if count},
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
