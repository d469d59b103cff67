"""Goodput: where the seconds of a run went, over all of its sessions.

A session is what one start of the program trains; a run that is resumed has several. `goodput.jsonl` in the workdir has their
records: the seconds of a session so far, by use. The steps of a session after the one from which a later session goes on are
repeated, so that their seconds are lost.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from json import dumps
from pathlib import Path

import jax

from hybrid_attn import compiled, files
from hybrid_attn.train.console import aligned, duration

FILE = "goodput.jsonl"
USES = ("step", "compile", "data", "checkpoint", "evaluation", "start", "restart", "lost", "other")
LABELS = {"step": "steps", "compile": "compilation", "data": "waiting for data", "checkpoint": "checkpoints"}
FIELDS = {"session", "first", "step", "time", "skipped", "seconds"}


class Goodput:
    """The clock of a session. Seconds that nothing else accounts for are those of the use that `rest` names next."""

    def __init__(self):
        self.seconds, self.past = dict.fromkeys(USES, 0.0), Totals([], 0)
        self.skipped = self.first = 0
        self._mark, self._added, self._file = time.perf_counter(), 0.0, None

    def open(self, workdir: Path, first: int) -> list[str]:
        """Goes on after the sessions in `workdir`, from step `first`; returns lines. Process 0 does it for all.

        From step 0 on, the records of a run whose checkpoints are gone are renamed, as those of its metrics are.
        """
        self.first = first
        if jax.process_index():
            return []
        path, notes = workdir / FILE, []
        sessions = read(path)
        if first == 0 and any(session[-1]["step"] for session in sessions):
            notes, sessions = [f"kept         the old {FILE} as {files.set_aside(path)}; the run starts at step 0"], []
        self.past = Totals(sessions, first)
        self._file = files.Appended(path)
        return notes

    def add(self, use: str, seconds: float) -> None:
        self.seconds[use] += seconds
        self._added += seconds

    def rest(self, use: str) -> None:
        """Accounts for the time since the last call of `rest` that was not added to another use."""
        now = time.perf_counter()
        self.seconds[use] += now - self._mark - self._added
        self._mark, self._added = now, 0.0

    @contextlib.contextmanager
    def timed(self, use: str) -> Iterator[None]:
        """Adds the time of the body."""
        before = time.perf_counter()
        yield
        self.add(use, time.perf_counter() - before)

    def skip(self) -> None:
        """Accounts for a step whose update is not taken."""
        self.rest("lost")
        self.skipped += 1

    def record(self, step: int) -> None:
        """Writes the seconds of this session until `step`."""
        if self._file:
            values = {"session": self.past.count, "first": self.first, "step": step, "time": time.time()}
            rounded = {use: round(x, 4) for use, x in self.seconds.items()}
            self._file.write((dumps(values | {"skipped": self.skipped, "seconds": rounded}) + "\n").encode())

    def totals(self) -> dict[str, float]:
        """The seconds of all sessions, by use."""
        start = "restart" if self.past.count else "start"
        ours = self.seconds | {"start": 0.0, start: self.seconds["start"]}
        return {use: self.past.seconds[use] + ours[use] for use in USES}

    def share(self) -> float:
        """The share of all seconds that went into steps which the run kept."""
        totals = self.totals()
        return totals["step"] / max(sum(totals.values()), 1e-9)

    def table(self) -> list[str]:
        """The lines of the table at the end of a session."""
        self.rest("other")
        totals, past = self.totals(), self.past
        every, skipped = sum(totals.values()), past.skipped + self.skipped
        notes = {"compile": compiled.summary(), "restart": f"{past.count} times"}
        notes["lost"] = f"{past.repeated} repeated and {skipped} skipped steps"
        rows = [("goodput", "", "seconds", "share")]
        for use, seconds in totals.items():
            if seconds >= 0.05 or use == "step" or (use == "lost" and past.repeated + skipped):
                rows.append((LABELS.get(use, use), notes.get(use, ""), f"{seconds:,.1f}", f"{seconds / every:.1%}"))
        rows.append(("all", f"and {duration(past.stopped)} between sessions" if past.count else "", f"{every:,.1f}", "100.0%"))
        return ["", *aligned(rows)]

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None


class Totals:
    """The sums over past sessions, after which a run goes on from step `first`."""

    def __init__(self, sessions: Sequence[Sequence[dict]], first: int):
        self.seconds, self.count = dict.fromkeys(USES, 0.0), len(sessions)
        self.repeated, self.skipped, self.stopped, end = 0, sum(x[-1]["skipped"] for x in sessions), 0.0, None
        for number, session in enumerate(sessions):
            last, used = session[-1], dict(session[-1]["seconds"])
            if number:
                used["restart"], used["start"] = used["start"], 0.0
                self.stopped += max(last["time"] - sum(last["seconds"].values()) - end, 0)
            goes_on = min([first, *(later[0]["first"] for later in sessions[number + 1 :])])
            useful = max((x["seconds"]["step"] for x in session if x["step"] <= goes_on), default=0.0)
            self.repeated += max(last["step"] - max(goes_on, last["first"]), 0)
            used["lost"], used["step"] = used["lost"] + used["step"] - useful, useful
            self.seconds = {use: x + used[use] for use, x in self.seconds.items()}
            end = last["time"]
        self.stopped += max(time.time() - end, 0) if sessions else 0.0


def read(path: Path) -> list[list[dict]]:
    """The records of each session; those that a kill truncated are left out."""
    sessions: dict[int, list[dict]] = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            record = files.object_of(line, FILE)
            if record.keys() == FIELDS and record["seconds"].keys() == set(USES):
                sessions.setdefault(record["session"], []).append(record)
    return list(sessions.values())
