"""Every second of a run has one use, over all of its sessions, and steps that are repeated after a kill are lost."""

import json
import time

import pytest
from trained import config_of

from hybrid_attn.train import goodput, loop
from hybrid_attn.train.goodput import Goodput


class Clock:
    """The time of a machine, for both clocks of the module."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        return self.now

    time = perf_counter


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(goodput, "time", clock)
    return clock


def session(clock, workdir, first, *reached):
    """A session of 3 seconds until its first step, 5 of compilation, and 2 for each step, of which half waits for data."""
    it = Goodput()
    assert it.open(workdir, first) == []
    clock.now += 3
    it.rest("start")
    it.add("compile", 5.0)
    clock.now += 5
    for step in range(first + 1, reached[-1] + 1):
        clock.now += 2
        it.add("data", 1.0)
        it.rest("step")
        if step in reached:
            it.record(step)
    return it


def test_seconds_have_one_use_each_and_repeated_steps_are_lost_in_every_session_that_had_them(tmp_path, clock):
    session(clock, tmp_path, 0, 4, 6, 9).close()
    clock.now += 60
    session(clock, tmp_path, 6, 7, 8).close()  # goes on from step 6: three steps of the first session are repeated
    clock.now += 40
    with (tmp_path / goodput.FILE).open("a") as file:
        file.write('{"session": 1, "fir')  # a kill while it was written
    last = session(clock, tmp_path, 4, 10)  # the checkpoint of step 6 was damaged: five of the first, two of the second
    last.skip()
    totals = last.totals()
    assert (totals["step"], totals["lost"], last.past.repeated) == (4 + 6, 5 + 2, 5 + 2)
    assert (totals["start"], totals["restart"], totals["compile"], totals["data"]) == (3, 6, 15, 9 + 2 + 6)
    assert (last.past.stopped, sum(totals.values())) == (100, 3 * 8 + 2 * (9 + 2 + 6))
    assert last.share() == pytest.approx(10 / 58)
    table = [line.split() for line in last.table() if line]
    assert ["lost", "7", "repeated", "and", "1", "skipped", "steps", "7.0", "12.1%"] in table
    assert table[-1] == "all and 1m 40s between sessions 58.0 100.0%".split()


def test_a_run_that_starts_anew_keeps_the_records_of_the_run_before_it_under_another_name(tmp_path, clock):
    session(clock, tmp_path, 0, 3).close()
    it = Goodput()
    (note,) = it.open(tmp_path, 0)
    assert note == f"kept         the old goodput.jsonl as {tmp_path}/goodput.jsonl.old; the run starts at step 0"
    assert it.past.count == 0


def test_a_killed_run_that_goes_on_says_what_was_lost_and_no_picture_stops_it(
    corpus, tmp_path, monkeypatch, capsys, known_peak_and_no_pictures
):
    advance, began = loop.Metrics.advance, time.perf_counter()

    def killed(self, number):
        advance(self, number)
        if number == 3:
            raise KeyboardInterrupt

    def broken(*_):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(loop.curves, "write", broken)
    changes = {"evals.names": ()}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Metrics, "advance", killed)
        loop.train(config_of(corpus, **changes), tmp_path)
    assert loop.train(config_of(corpus, **changes), tmp_path)
    took, said = time.perf_counter() - began, capsys.readouterr().out
    assert "loss.png is not drawn: RuntimeError: no fonts\n" in said
    first, second = goodput.read(tmp_path / goodput.FILE)
    assert (first[-1]["step"], second[0]["first"], second[-1]["step"]) == (3, 2, 6)
    assert "  1 repeated and 0 skipped steps  " in said
    seconds = [sum(session[-1]["seconds"].values()) for session in (first, second)]
    assert 0.8 * took < sum(seconds) <= took and all(x >= 0 for x in second[-1]["seconds"].values())
    shares = [json.loads(line)["goodput"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert shares[-1] == pytest.approx((second[-1]["seconds"]["step"] + first[1]["seconds"]["step"]) / sum(seconds), rel=0.3)
