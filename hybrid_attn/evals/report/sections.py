"""What a report says, in order: sections of words, pictures and tables."""

from collections.abc import Callable, Sequence

from hybrid_attn.evals.report import attention, contents, heatmaps, layers, losses, overview, questions, statistics
from hybrid_attn.evals.report.canvas import Picture
from hybrid_attn.evals.report.runs import Run
from hybrid_attn.evals.report.section import Section


def sections(runs: Sequence[Run]) -> list[Section]:
    """Those that the runs have records for."""
    has = {record["eval"] for run in runs for record in run.records}
    parts: list[tuple[str, Callable[[Sequence[Run]], list[Section]]]] = [
        ("ruler", questions.ruler),
        ("needle", questions.needle),
        ("recall", questions.recall),
        ("position", losses.position),
        ("key_tokens", losses.key_tokens),
        ("attention_mass", _attention),
        ("harness", _harness),
    ]
    found = [section for name, make in parts if name in has for section in make(runs)]
    return [_overview(runs), *found, *_comparison(runs), *_absent(runs), _provenance(runs)]


def _overview(runs: Sequence[Run]) -> Section:
    table = overview.table(runs)
    words = [" ".join(told)] if (told := overview.meanings(table)) else []
    return Section("overview", "At a glance", [*words, *layers.meanings(runs)], [], [table], [])


def _attention(runs: Sequence[Run]) -> list[Section]:
    prompts = sorted({r["prompts"] for run in runs for r in run.of("attention_mass")})
    words = [
        "Shares of the attention of the question's tokens, means over heads and over so many prompts: "
        f"{', '.join(map(str, prompts))}. The needle's lift is its share over the share of the tokens that it has; a retrieval "
        f"head (score over {contents.RETRIEVES}) looks at the token that it copies. Per token: a segment's share over its "
        "tokens; token 0 is the share of the very first. Crosses: layers whose window does not reach the needle. Single heads, "
        "and weights by position without the first 10 and the last 3% of the keys, are drawn at the longest length."
    ]
    drawn = attention.pictures(runs)
    return [Section("attention", "Attention", words, drawn, [contents.attention(runs)], [], "attention_mass")]


def _harness(runs: Sequence[Run]) -> list[Section]:
    words = [
        "A truncated request lost the beginning of its prompt: its score says little about context. A windowed text was scored "
        "in several pieces."
    ]
    return [Section("harness", "Harness", words, [], [contents.harness(runs)], [], "harness")]


def _comparison(runs: Sequence[Run]) -> list[Section]:
    found = contents.differences(runs)
    first, drawn = runs[0].name, []
    for number, (name, several) in enumerate(found, 1):
        if several := [x for x in several if not x.loss]:
            counts = [f"{sum(contents.verdict(x) == y for x in several)} {y}" for y in ("better", "worse", "unclear")]
            caption = f"{name} against {first}: of {len(several)} comparisons {', '.join(counts)}."
            note = f"{name} less {first}; in bold and in the colour of the better run where it is clear."
            figure = heatmaps.differences(several, number)
            drawn.append(Picture(f"comparison_{number}", caption, figure, note, "comparison"))
    if not any(several for _, several in found):
        return []
    words = [
        "Only questions that both runs were asked count, word for word, and rows that both have read. The interval is a paired "
        f"bootstrap over them, with {statistics.RESAMPLES:,} resamples; where all pairs differ by the same, it follows from "
        f"Wilson's, as Newcombe's does. Fewer than {statistics.PAIRS} pairs of a task leave it unclear. The mean of tasks "
        "gives each task the same weight, that of rows each row. Of losses, less is better."
    ]
    return [Section("comparison", "Comparison", words, drawn, [contents.comparison(first, found)], [])]


def _absent(runs: Sequence[Run]) -> list[Section]:
    table = contents.absent(runs)
    return [Section("absent", "Absent", [], [], [table], [])] if table.rows else []


def _provenance(runs: Sequence[Run]) -> Section:
    return Section("provenance", "Provenance", [], [], [contents.provenance(runs)], [])
