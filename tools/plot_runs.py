"""Draws curves of several runs: python tools/plot_runs.py --workdir=runs/hybrid_8k --workdir=runs/rope_8k --out=loss.png

Reads metrics.jsonl of each workdir. --value is a name of its lines: loss (the mean since the line before), bits_per_byte,
grad_norm, tokens_per_s, lr, ... Exit codes: 2 for a wrong flag or input.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from absl import app, flags

from hybrid_attn import programs
from hybrid_attn.files import write_atomically
from hybrid_attn.train.curves import is_number, png, points, read, smoothed, style_axes
from hybrid_attn.trees import check, suggestion

WORKDIR = flags.DEFINE_multi_string("workdir", None, "Workdir of a run; may be repeated.", required=True)
OUT = flags.DEFINE_string("out", None, "The picture, a .png file.", required=True)
LABEL = flags.DEFINE_multi_string("label", [], "Label of each run, in their order; by default its directory's name.")
VALUE = flags.DEFINE_string("value", "loss", "Name of a number in the lines of metrics.jsonl.")
X = flags.DEFINE_enum("x", "steps", ["steps", "tokens"], "Unit of the horizontal axis.")
SMOOTH = flags.DEFINE_integer("smooth", 1, "Draw the mean over this many steps; the values themselves are pale.", 1)
LOG_X = flags.DEFINE_bool("log_x", False, "A logarithmic horizontal axis.")
AXES = {"steps": "step", "tokens": "tokens_seen"}
MEANS = ("loss", "bits_per_byte")  # a line also has their mean since the previous line
UNITS = {
    "loss": "loss (nats per token)", "bits_per_byte": "bits per byte", "lr": "learning rate", "step_time": "seconds per step",
    "tokens_per_s": "tokens per second", "mfu": "share of the peak FLOP/s", "grad_norm": "norm of the gradient",
    "param_norm": "norm of the parameters", "peak_memory_bytes": "peak memory (bytes)",
}  # fmt: skip


class Curve(NamedTuple):
    label: str
    steps: Sequence[int]
    x: Sequence[float]
    y: Sequence[float]


def curve(label: str, workdir: str) -> Curve:
    """The values of a run where they and the horizontal axis are finite numbers; ValueError where none are."""
    path, name, axis = Path(workdir) / "metrics.jsonl", VALUE.value, AXES[X.value]
    check(path.is_file(), f"--workdir={workdir} has no metrics.jsonl; name the workdir of a run")
    lines = read(path)
    known = sorted({key for line in lines for key, x in line.items() if is_number(x)})
    if name in MEANS and f"{name}_mean" in known:
        name = f"{name}_mean"
    for key in (name, axis):
        hint = suggestion(key, known)
        it = f"{hint} It" if hint else "it"
        check(key in known, f"{workdir}/metrics.jsonl has no {key!r}; {it} has {', '.join(known)}")
    pairs = points(lines, "step", axis, name)
    check(len(pairs) > 0, f"{workdir}/metrics.jsonl has no line with both {name!r} and {axis!r}")
    return Curve(label, *zip(*pairs, strict=True))


def picture(curves: Sequence[Curve]) -> bytes:
    """The curves as a PNG."""
    from matplotlib.figure import Figure  # takes a second; --help stays fast

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (label, steps, x, y) in enumerate(curves):
        mean = smoothed(steps, y, SMOOTH.value)
        look = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":", "-.")[number // 10 % 4]}
        style = look | ({"marker": "."} if len(x) == 1 else {})
        if SMOOTH.value > 1:
            axes.plot(x, y, alpha=0.25, linewidth=1, **look)
        axes.plot(x, mean, label=f"{label}: {mean[-1]:.4g}", linewidth=1.6, **style)
    style_axes(axes)
    if LOG_X.value:
        axes.set_xscale("log")
    axes.set(xlabel={"steps": "step", "tokens": "tokens seen"}[X.value], ylabel=UNITS.get(VALUE.value, VALUE.value))
    axes.legend(title="run: last value" + (f", mean of {SMOOTH.value:,} steps" if SMOOTH.value > 1 else ""), frameon=False)
    return png(figure)


def plot() -> None:
    out = Path(OUT.value)
    check(out.suffix == ".png", f"--out={out} must end in .png")
    check(out.parent.is_dir(), f"--out={out}: {out.parent} is no directory; make it first")
    count, runs = len(LABEL.value), len(WORKDIR.value)
    check(count in (0, runs), f"--label is given {count} times for {runs} runs; give one for each, or none")
    names = [Path(workdir).resolve().name for workdir in WORKDIR.value]
    labels = LABEL.value or (names if len(set(names)) == runs else WORKDIR.value)
    curves = [curve(*pair) for pair in zip(labels, WORKDIR.value, strict=True)]
    write_atomically(out, picture(curves))
    print(f"picture  {out}")


def main(argv):
    programs.run(plot, argv, "the picture")


if __name__ == "__main__":
    app.run(main, flags_parser=programs.parse)
