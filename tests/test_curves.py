"""The picture of a run has its loss, its schedule and the stages that began."""

import json

from matplotlib.image import imread

from hybrid_attn.train.curves import picture, read, write


def lines(steps, edge):
    """A run whose second stage begins after step `edge`, with longer sequences."""
    return [
        {"step": step, "loss_mean": 4.0 / step, "lr": 1e-3 * step, "seq_len": 48 if step <= edge else 96}
        for step in range(10, steps + 1, 10)
    ]


def test_the_picture_has_the_means_the_rates_the_lengths_and_the_names_of_the_stages_that_began(tmp_path):
    content = [*lines(200, 110), {"step": 207, "skipped": True, "reason": "x"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
    figure = picture(read(tmp_path / "metrics.jsonl"), {0: "short", 110: "long", 300: "longer"})
    above, below, right = figure.axes
    raw, mean = above.lines[:2]
    assert list(raw.get_xdata()) == list(range(10, 201, 10)) and raw.get_ydata()[-1] == 4 / 200
    assert list(below.lines[0].get_ydata()) == [1e-3 * step for step in range(10, 201, 10)]
    assert list(right.lines[0].get_ydata()) == [48] * 11 + [96] * 9
    assert [text.get_text().strip() for text in above.texts] == ["short", "long"]
    assert "the last is 0.02" in above.get_legend().get_texts()[0].get_text()


def test_a_run_of_one_line_and_one_stage_is_drawn_into_its_workdir(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines(10, 10)[0]) + "\n")
    write(tmp_path, {0: "1"})
    assert imread(tmp_path / "loss.png").shape == (900, 1200, 4)
