"""The numbers of a run reach every sink that its config names; a sink is a class and a row of a table."""

import json
import sqlite3

import jax
import numpy as np
import pytest
from conftest import tensorboard_events, tiny
from tensorboardX.proto import layout_pb2
from test_metrics import VALUES

from hybrid_attn.train import loop, sinks
from hybrid_attn.train.metrics import Metrics
from hybrid_attn.train.sinks import SINKS, Row
from hybrid_attn.train.statistics import BY_LAYER_TYPE

STATISTICS = {"logit_max/L": 3.5, "logit_max/G": 7.25, "grad_norm/G/attention/q": 0.5, "grad_norm/embed": 0.25, "x/L": np.nan}
TAGS = {"L/logit_max": 3.5, "G/logit_max": 7.25, "G/grad_norm/attention/q": 0.5, "embed/grad_norm": 0.25}


def with_sinks(*names, **changes):
    return tiny({"train.sinks": names, "train.statistics_every": 2} | changes)


def write(workdir, c, start=0, steps=(1, 2)):
    """The lines of the steps, the statistics of the even ones, a score and a picture at the last one."""
    metrics = Metrics(workdir, start, c).open()
    for step in steps:
        if step % 2 == 0:
            metrics.statistics(step, STATISTICS)
        metrics.log(step, VALUES)
        metrics.advance(step)
    metrics.score("position/text/48", 2.5)
    metrics.picture("position/curve", np.full((4, 5, 3), 0.5))
    metrics.close()


class Toy:
    def __init__(self, workdir, start, config):
        self.seen = [("open", workdir.name, start, config.seed)]
        opened.append(self)

    def scalars(self, step, values):
        self.seen.append((step, dict(values)))

    def picture(self, step, tag, pixels_HWC):
        self.seen.append((step, tag, pixels_HWC.shape))

    def close(self):
        self.seen.append("close")


opened: list[Toy] = []


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(SINKS, "toy", Row(Toy))
    opened.clear()


def test_a_toy_sink_gets_numbers_by_tag_pictures_and_the_end_and_json_lines_are_there_without_tensorboard(toy, tmp_path):
    write(tmp_path / "run", with_sinks("toy"), start=0)
    (sink,) = opened
    assert sink.seen[0] == ("open", "run", 0, 0) and sink.seen[-1] == "close"
    (first_step, first), (_, statistics), (_, second), score, picture = sink.seen[1:-1]
    assert first_step == 1 and first == second and first["train/loss_nats"] == 2.3125 and first["speed/mfu_share"] == 0.4
    assert statistics == TAGS, "what is not a number is not shown"
    assert score == (2, {"position/text/48": 2.5}) and picture == (2, "position/curve", (4, 5, 3))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"metrics.jsonl", "evals.jsonl", "statistics.jsonl"}
    (line,) = (tmp_path / "run" / "statistics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 2, **STATISTICS, "x/L": None}


def test_no_other_process_than_the_first_opens_a_sink(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write(tmp_path / "run", with_sinks("toy", "tensorboard"))
    assert not opened and not (tmp_path / "run").exists()


def test_statistics_of_steps_after_the_one_reached_are_written_again(tmp_path):
    write(tmp_path, with_sinks(), steps=(2, 4, 6))
    write(tmp_path, with_sinks(), start=4, steps=(6, 8))
    steps = [json.loads(line)["step"] for line in (tmp_path / "statistics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 8]


def test_tensorboard_groups_statistics_by_layer_type_and_has_a_chart_of_all_types_for_each(tmp_path):
    write(tmp_path, with_sinks("tensorboard"))
    values = [(event.step, value) for event in tensorboard_events(tmp_path) for value in event.summary.value]
    assert {value.tag: value.simple_value for step, value in values if step == 2 and value.tag in TAGS} == TAGS
    (layout,) = (value for _, value in values if value.metadata.plugin_data.plugin_name == "custom_scalars")
    (category,) = layout_pb2.Layout.FromString(layout.tensor.string_val[0]).category
    charts = {chart.title: list(chart.multiline.tag) for chart in category.chart}
    assert charts == {name: [f"^G/{name}$", f"^L/{name}$"] for name in BY_LAYER_TYPE}


def test_a_run_without_statistics_has_no_charts_of_them(tmp_path):
    write(tmp_path, with_sinks("tensorboard", **{"train.statistics_every": None}), steps=(1,))
    tags = {value.tag for event in tensorboard_events(tmp_path) for value in event.summary.value}
    assert tags.isdisjoint(TAGS) and "custom_scalars__config__" not in tags
    assert not (tmp_path / "statistics.jsonl").exists()


@pytest.mark.parametrize(
    "names, message",
    [
        (
            ("wandb",),
            r"^train.sinks has 'wandb', whose package is not here: pip install 'hybrid_attn\[wandb\]', or leave it out$",
        ),
        (("tensorbord",), "train.sinks='tensorbord' is not one of 'tensorboard'.*; did you mean 'tensorboard'"),
    ],
)
def test_a_sink_that_is_not_there_is_an_error_before_anything_is_written(names, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        loop.train(with_sinks(*names), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_sink_named_twice_is_an_error():
    with pytest.raises(ValueError, match="train.sinks=.* names 'tensorboard' twice"):
        with_sinks("tensorboard", "tensorboard")


def test_wandb_gets_the_numbers_offline_in_the_workdir(tmp_path, monkeypatch):
    package = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write(tmp_path / "run", with_sinks("wandb"))
    package.teardown()  # waits for its process, which writes the file
    (record,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    content = record.read_bytes()
    for text in ("run from 0", "hybrid-attn", "train/loss_nats", "2.3125", *TAGS, "7.25", "position/text/48"):
        assert text.encode() in content, text
    (picture,) = record.parent.rglob("*.png")
    assert "curve" in picture.name


def test_trackio_gets_the_numbers_in_its_own_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # before the package is imported
    pytest.importorskip("trackio")
    write(tmp_path / "run", with_sinks("trackio"))
    with sqlite3.connect(tmp_path / "trackio" / "hybrid-attn.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, *_ in rows} == {"run from 0"} and len(rows) == 5
    assert json.loads(rows[0][2])["train/loss_nats"] == 2.3125
    assert (rows[1][1], json.loads(rows[1][2])) == (2, TAGS)
    assert len(list((tmp_path / "trackio" / "media").rglob("*.png"))) == 1
