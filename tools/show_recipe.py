"""Draws the recipe of a config and says what each stage costs, without a device and without data: no step is run.

python tools/show_recipe.py --config=configs/hybrid_8k.py:8b --chip=v5p --chips=64 --mfu=0.4 --out=recipe.png
python tools/show_recipe.py --config=configs/hybrid_8k.py:8b --target=v5p:4x4x4          # memory of the compiled steps

It prints a line for each stage: steps, length, batch, tokens, learning rate, mixture, FLOPs, time and memory. The picture has
the rate, length, batch, mixture and tokens over the steps. The memory is an estimate, or with --target that of tools/plan.py.
Exit codes: 2 for a wrong flag or config.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from hybrid_attn import config, config_file, programs
from hybrid_attn.bench.measurement import table
from hybrid_attn.files import write_atomically
from hybrid_attn.model import specs
from hybrid_attn.parallel import fit
from hybrid_attn.parallel.mesh import AXES, abstract_mesh, axis_sizes
from hybrid_attn.plan.estimate import estimated_memory
from hybrid_attn.plan.step import gb, make_plan
from hybrid_attn.plan.targets import CHIPS, FORMS, Target, find_target
from hybrid_attn.train.console import duration, named_stage, short_count
from hybrid_attn.train.cost import flops_per_token
from hybrid_attn.train.metrics import PEAKS
from hybrid_attn.train.schedule import schedule
from hybrid_attn.train.trainable import is_trained
from hybrid_attn.trees import check

CONFIG = config_file.define("config", None, "Config file, with its argument after a colon.", config.Config)
config_file.define_last_stage()
flags.mark_flag_as_required("config")
OUT = flags.DEFINE_string("out", None, "The picture, a .png file; without it only the table is printed.")
CHIP = flags.DEFINE_enum("chip", None, [*CHIPS], "Chip that the time and the memory are of; by default v5e.")
NUMBER = flags.DEFINE_integer("chips", None, "Number of chips, the devices of the mesh; by default 1.", 1)
TARGET = flags.DEFINE_string("target", None, f"Compile the steps for {FORMS}, instead of --chip and --chips.")
MFU = flags.DEFINE_float("mfu", 0.4, "Share of the peak FLOP/s that a step reaches.", 0.001, 1.0)
KINDS = {"v4": "TPU v4", "v5e": "TPU v5e", "v5p": "TPU v5", "v6e": "TPU v6e", "h100": "H100"}  # in PEAKS
POINTS = 1000  # of the learning rate in a stage
HEADER = ("stage", "steps", "length", "batch", "tokens", "rate", "mixture", "FLOPs", "time", "memory")


class Chips(NamedTuple):
    """What a run is computed on. `peak` is the FLOP/s of a chip, NaN if unknown; `target` has devices to compile for."""

    name: str
    number: int
    platform: str
    peak: float
    target: Target | None


def chosen_chips() -> Chips:
    """The chips of the flags."""
    if TARGET.value is None:
        name, target = CHIP.value or "v5e", None
        number, platform = NUMBER.value or 1, "gpu" if name == "h100" else "tpu"
    else:
        check(CHIP.value is None and NUMBER.value is None, f"--target={TARGET.value} names chips; leave out --chip and --chips")
        name, target = TARGET.value.partition(":")[0], find_target(TARGET.value)
        number, platform = len(target.devices), target.platform
    return Chips(name, number, platform, dict(PEAKS).get(KINDS.get(name), math.nan), target)


class Span(NamedTuple):
    """Consecutive steps of one batch size: the first of them, and how many there are."""

    stage: config.StageConfig
    first: int
    steps: int
    batch: int

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * self.stage.seq_len

    @property
    def flops(self) -> float:
        return self.tokens * flops_per_token(self.stage)


def spans_of(c: config.Config) -> list[Span]:
    """The spans of a run, in order."""
    spans, first = [], 0
    for stage, of_config in zip(c.each_stage, c.stages, strict=True):
        for steps, batch in of_config.spans(of_config.steps):
            spans.append(Span(stage, first, steps, batch))
            first += steps
    return spans


def rates_of(c: config.Config) -> list[tuple[np.ndarray, np.ndarray]]:
    """Steps of each stage, the first and the last among them, and their learning rates."""
    rate, ends = jax.vmap(schedule(c.optim, c.pieces)), np.cumsum([0, *(stage.steps for stage in c.stages)])
    spaced = (np.linspace(first, end - 1, POINTS).round() for first, end in zip(ends, ends[1:], strict=False))
    steps = [np.unique(x.astype(np.int32)) for x in spaced]
    return [(x, np.asarray(rate(jnp.asarray(x)))) for x in steps]


def text_of(mixture: dict[str, float]) -> str:
    """The share of each source, such as "books 0.3, web 0.7"."""
    total = sum(mixture.values())
    return ", ".join(name if len(mixture) == 1 else f"{name} {weight / total:.3g}" for name, weight in mixture.items())


def time_of(spans: Sequence[Span], chips: Chips) -> str:
    """The time of spans, which the peak and --mfu give."""
    seconds = sum(span.flops for span in spans) / (chips.peak * chips.number * MFU.value)
    return "unknown" if math.isnan(seconds) else duration(seconds)


def row_of(c: config.Config, spans: Sequence[Span], rates: np.ndarray, chips: Chips) -> list[str]:
    """The line in the table of a stage with these spans."""
    stage = spans[0].stage
    if chips.target is None:
        is_trained(stage, specs(stage.model))
        fit.check(c, chips.number)
        mesh = abstract_mesh(**dict(zip(AXES, axis_sizes(stage.mesh, chips.number), strict=True)))
        size = estimated_memory(c, stage, mesh, chips.platform)
    else:
        size = make_plan(c, chips.target, stage.index).peak
    return [
        named_stage(stage),
        f"{stage.steps:,}",
        f"{stage.seq_len:,}",
        " to ".join(f"{span.batch:,}" for span in spans),
        short_count(sum(span.tokens for span in spans)),
        f"{rates[0]:.3g} to {rates.max():.3g} to {rates[-1]:.3g}",
        text_of(stage.mixture),
        f"{sum(span.flops for span in spans):.3g}",
        time_of(spans, chips),
        gb(size),
    ]


def describe(c: config.Config, chips: Chips) -> list[str]:
    """The lines of a recipe: its total, a table of its stages, and what the columns mean."""
    spans, rates = spans_of(c), rates_of(c)
    by_stage = [[span for span in spans if span.stage.index == index] for index in range(len(c.stages))]
    rows = [row_of(c, of_stage, y, chips) for of_stage, (_, y) in zip(by_stage, rates, strict=True)]
    programs_needed = len({(span.stage, span.batch) for span in spans})
    origin = "estimated by tracing" if chips.target is None else "as compiled, which tools/plan.py shows in detail"
    return [
        f"run          {sum(span.tokens for span in spans):,} tokens in {c.total_steps:,} steps; programs: {programs_needed}",
        f"cost         {sum(span.flops for span in spans):.4g} FLOPs; time {time_of(spans, chips)} on {chips.number:,} x "
        f"{chips.name} at {MFU.value:.0%} of {chips.peak:.4g} FLOP/s each",
        "",
        table(HEADER, rows),
        "",
        "rate         first, largest and last of the stage",
        f"memory       of a device at the full batch: parameters, optimiser state, gradients, and activations {origin}",
    ]


def picture(c: config.Config) -> bytes:
    """Rate, length, batch, mixture and tokens over the steps as a PNG."""
    from matplotlib.figure import Figure  # takes a second; --help stays fast

    spans, figure = spans_of(c), Figure(figsize=(9, 10), layout="constrained")
    edges, lengths = np.array([*(x.first for x in spans), c.total_steps]), sorted({x.stage.seq_len for x in spans})
    rate, length, batch, mixture, tokens = panels = figure.subplots(5, sharex=True)
    rate.plot(*(np.concatenate(x) for x in zip(*rates_of(c), strict=True)))
    length.stairs([span.stage.seq_len for span in spans], edges, baseline=None, linewidth=1.6)
    length.set_yscale("log", base=2)
    length.set_yticks(lengths, [f"{x:,}" for x in lengths])
    length.set_ylim(lengths[0] / 1.5, lengths[-1] * 1.5)
    batch.stairs([span.batch for span in spans], edges, baseline=None, linewidth=1.6)
    draw_mixture(mixture, spans, edges)
    tokens.plot(edges, np.cumsum([0, *(span.tokens for span in spans)]))
    labels = "learning rate", "length (tokens)", "batch (sequences)", "share of the mixture", "tokens seen"
    for axes, label in zip(panels, labels, strict=True):
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        for begin in np.cumsum([stage.steps for stage in c.stages])[:-1]:
            axes.axvline(begin, color="0.5", linewidth=0.8, linestyle=":")
    for axes in (rate, batch, tokens):
        axes.set_ylim(bottom=0)
    tokens.set(xlabel="step" + ("; dotted: a stage begins" if len(c.stages) > 1 else ""), xlim=(0, c.total_steps))
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


def draw_mixture(axes, spans: Sequence[Span], edges: np.ndarray) -> None:
    """The share of each source, one above the other."""
    below = np.zeros(len(spans))
    for name in sorted({name for span in spans for name in span.stage.mixture}):
        share = np.array([span.stage.mixture.get(name, 0.0) / sum(span.stage.mixture.values()) for span in spans])
        axes.stairs(below + share, edges, baseline=below, fill=True, label=name)
        below = below + share
    axes.set_ylim(0, 1)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def show() -> None:
    c = config.build(CONFIG.value.values)
    out = None if OUT.value is None else Path(OUT.value)
    check(out is None or out.suffix == ".png", f"--out={out} must end in .png")
    check(out is None or out.parent.is_dir(), f"--out={out}: its directory does not exist; make it first")
    jax.config.update("jax_platforms", "cpu")  # a run may hold the devices meanwhile
    print(*describe(c, chosen_chips()), sep="\n")
    if out is not None:
        write_atomically(out, picture(c))
        print(f"picture      {out}")


def main(argv):
    programs.run(show, argv)


if __name__ == "__main__":
    app.run(main, flags_parser=programs.parse)
