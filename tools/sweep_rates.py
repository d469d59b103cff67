"""Trains one model in several widths at several learning rates, with µP and without, and draws the last losses.

    python tools/sweep_rates.py --config=configs/mup.py --widths=64,128,256 --rates=1e-3,2e-3,4e-3,8e-3 --out=sweep.svg

With µP (docs/optimisers.md) the best rate stays where it is at the width of the base model, which is d_model of --config unless
it has a mup_base_width. Heads and feed-forward grow with the width. A loss is the mean over the last tenth of the steps of the
first stage. A line on stderr follows each run, and the tables at the end. Exit codes: 2 for a wrong flag or input.
"""

import sys
from pathlib import Path

import numpy as np
from absl import app, flags

from hybrid_attn import config, config_file, programs
from hybrid_attn.bench.widths import FORMS, at_width, encoded, trained
from hybrid_attn.config import Config
from hybrid_attn.files import write_atomically
from hybrid_attn.train import loop
from hybrid_attn.trees import check

WIDTHS = flags.DEFINE_list("widths", ["64", "128", "256"], "Values of model.d_model.")
RATES = flags.DEFINE_list("rates", ["1e-3", "2e-3", "4e-3", "8e-3", "1.6e-2"], "Values of optim.lr.")
OUT = flags.DEFINE_string("out", None, "The picture, a .png or .svg file.", required=True)
CONFIG = config_file.define("config", str(Path(__file__).parents[1] / "configs" / "mup.py"), "The model and its data.", Config)
Losses = dict[int, list[float]]  # by width, of each rate


def last_loss(c: Config, data: loop.TrainingData, rate: float) -> float:
    """The mean over the last tenth of the steps, or infinity if the training diverges."""
    losses = [float(loss) for _, _, loss in trained(c, data, rate / c.optim.lr) if loss is not None]
    mean = np.mean(losses[-max(len(losses) // 10, 1) :])
    return float(mean) if np.isfinite(mean) else float("inf")


def sweep(c: Config, widths: list[int], rates: list[float]) -> dict[str, Losses]:
    """The losses of both parametrisations."""
    configs = {(form, width): at_width(c, width, form) for form in FORMS for width in widths}
    data, losses = loop.load_data(c), {form: {width: [] for width in widths} for form in FORMS}
    for (form, width), of_width in configs.items():
        for rate in rates:
            loss = last_loss(of_width, data, rate)
            losses[form][width].append(loss)
            print(f"{FORMS[form]}  width {width}  rate {rate:g}  loss {loss:.4f}", file=sys.stderr, flush=True)
    return losses


def table(form: str, losses: Losses, rates: list[float]) -> str:
    """A Markdown table with the best loss of each width in bold."""
    lines = [f"| {FORMS[form]} | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for width, row in losses.items():
        cells = (f"**{loss:.3f}**" if loss == min(row) else f"{loss:.3f}" for loss in row)
        lines.append(f"| width {width} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(losses: dict[str, Losses], rates: list[float], suffix: str) -> bytes:
    from matplotlib.figure import Figure  # takes a second; --help stays fast

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for axes, (form, by_width) in zip(figure.subplots(1, 2, sharey=True), losses.items(), strict=True):
        for number, (width, row) in enumerate(by_width.items()):
            axes.plot(rates, row, ".-", color=f"C{number}", label=f"width {width}")
            axes.plot(rates[int(np.argmin(row))], min(row), "o", color=f"C{number}", markersize=8)
        axes.set(title=FORMS[form], xlabel="learning rate", xscale="log")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("loss (nats per token)")
    figure.axes[0].legend(frameon=False)
    return encoded(figure, suffix)


def main(argv):
    programs.run(program, argv, "the models")


def program() -> None:
    out, widths, rates = Path(OUT.value), [int(x) for x in WIDTHS.value], [float(x) for x in RATES.value]
    check(out.suffix in (".png", ".svg"), f"--out={out} must end in .png or .svg")
    check(out.parent.is_dir(), f"--out={out}: {out.parent} is no directory; make it first")
    c = config.build(CONFIG.value.values)
    check(not c.optim.independent_decay, "--config has optim.independent_decay=True, and the decay is swept with the rate here")
    losses = sweep(c, widths, rates)
    write_atomically(out, picture(losses, rates, out.suffix))
    print("\n\n".join(table(form, by_width, rates) for form, by_width in losses.items()))


if __name__ == "__main__":
    app.run(main, flags_parser=programs.parse)
