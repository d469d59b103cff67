"""Draws the size of activations over the width of a model, with µP and without, in the first steps of training.

    python tools/coordinate_check.py --config=configs/mup.py --widths=64,128,256,512,1024 --steps=8 --out=check.svg

The model of --config in several widths (heads and feed-forward grow in proportion) takes some steps on its own data. After each
step its activations of the first batch are measured, as a root mean square: of what the layers of each type add to the residual
stream (the mean over these layers), of the stream after the last layer, and of the change of the logits since the first step.
With µP (docs/optimisers.md) they come to the same in every width; where a line rises or falls with the width, a weight starts
too large or too small, or moves too fast or too slowly. The base of µP is the mup_base_width of --config, or else its d_model.

Prints a table with the largest over the smallest value. Exit codes: 2 for a wrong flag or input.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from hybrid_attn import config, config_file, programs
from hybrid_attn.bench.widths import FORMS, at_width, encoded, trained
from hybrid_attn.config import Config, Model
from hybrid_attn.files import write_atomically
from hybrid_attn.model import Execution, execution_on, logits
from hybrid_attn.model.transformer import bind, final_norm, look_up, packed_mixing, unstacked
from hybrid_attn.train import loop
from hybrid_attn.trees import check

WIDTHS = flags.DEFINE_list("widths", ["64", "256", "1024"], "Values of model.d_model.")
STEPS = flags.DEFINE_integer("steps", 8, "Steps of training.", lower_bound=1)
SEEDS = flags.DEFINE_integer("seeds", 1, "Means over so many first parameters.", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "The picture, a .png or .svg file.", required=True)
CONFIG = config_file.define("config", str(Path(__file__).parents[1] / "configs" / "mup.py"), "The model and its data.", Config)
INPUTS = "tokens", "positions", "segments"
STREAM, LOGITS = "residual stream", "change of logits"
Sizes = dict[str, np.ndarray]  # by name, one for each step: before the first, …, after the last


def rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))


def activations(model: Model, params: dict, batch: dict, execution: Execution) -> tuple[dict[str, jax.Array], jax.Array]:
    """The root mean square of each kind of activations of a batch, and its logits [B, T, V]."""
    leaves, tokens_BT, pos_BT, seg_BT = unstacked(model, params, execution.dtype), *map(batch.get, INPUTS)
    x_BTD, by_letter = look_up(leaves["embed"], tokens_BT, execution.dtype) * model.embed_scale, {}
    for letter, of_layer in zip(model.layers, leaves["layers"], strict=True):
        mixing = packed_mixing(model, letter, pos_BT, seg_BT, execution)
        y_BTD = bind(model, letter, of_layer, execution)(x_BTD, pos_BT, seg_BT, mixing, execution.mlp_chunks(letter))[0]
        by_letter.setdefault(letter, []).append(rms(y_BTD - x_BTD))
        x_BTD = y_BTD
    sizes = {f"layers {letter}": jnp.stack(added).mean() for letter, added in sorted(by_letter.items())}
    return sizes | {STREAM: rms(x_BTD)}, logits(model, leaves, final_norm(model, leaves, x_BTD))


def measured(c: Config, data: loop.TrainingData) -> Sizes:
    """The sizes of the activations of the first batch before and after each step."""
    execution = execution_on(jax.default_backend(), c.model, c.train)
    measure = jax.jit(lambda params, batch: activations(c.model, params, batch, execution))
    first, before, rows = None, None, []
    for state, batch, _ in trained(c, data):
        first = first or batch
        sizes, now_BTV = measure(state.params, first)
        before = now_BTV if before is None else before
        rows.append(sizes | {LOGITS: rms(now_BTV - before)})
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def check_widths(c: Config, widths: Sequence[int]) -> dict[str, dict[int, Sizes]]:
    """The sizes by parametrisation and width, each the mean over the seeds."""
    stage = dataclasses.replace(c.stages[0], steps=STEPS.value, lr_schedule=None, microbatches=1)
    optim = dataclasses.replace(c.optim, schedule="constant", warmup_steps=0)
    c = dataclasses.replace(c, stages=(stage,), optim=optim)
    configs = {(form, width): at_width(c, width, form) for form in FORMS for width in widths}
    data, result = loop.load_data(c), {form: {} for form in FORMS}
    for (form, width), of_width in configs.items():
        runs = [measured(dataclasses.replace(of_width, seed=c.seed + seed), data) for seed in range(SEEDS.value)]
        result[form][width] = {name: np.mean([run[name] for run in runs], 0) for name in runs[0]}
        print(f"{FORMS[form]}  width {width}", file=sys.stderr, flush=True)
    return result


def table(by_width: dict[int, Sizes], form: str) -> str:
    """A Markdown table of the sizes after the last step."""
    lines = [f"| {FORMS[form]} | " + " | ".join(map(str, by_width)) + " | max / min |", "|---" * (len(by_width) + 2) + "|"]
    for name in next(iter(by_width.values())):
        row = [sizes[name][-1] for sizes in by_width.values()]
        lines.append(f"| {name} | " + " | ".join(f"{x:.3g}" for x in row) + f" | {max(row) / min(row):.2f} |")
    return "\n".join(lines)


def picture(result: dict[str, dict[int, Sizes]], suffix: str) -> bytes:
    """A row of charts for each parametrisation, a chart for each kind of activations, a line for each step."""
    from matplotlib import colormaps  # takes a second; --help stays fast
    from matplotlib.figure import Figure

    names = list(next(iter(result["mup"].values())))
    figure = Figure(figsize=(2.4 * len(names), 4.6), layout="constrained")
    charts = figure.subplots(len(FORMS), len(names), sharex=True, sharey="col")
    for row, (form, by_width) in zip(charts, result.items(), strict=True):
        for axes, name in zip(row, names, strict=True):
            sizes = np.array([sizes[name] for sizes in by_width.values()])
            for step in range(sizes.shape[1]):
                color = colormaps["viridis"](step / sizes.shape[1])
                axes.plot(list(by_width), sizes[:, step], ".-", color=color, label=f"after step {step}", linewidth=1)
            axes.set(xscale="log", yscale="log", title=f"{name}, µP" if form == "mup" else name)
            axes.set_xticks(list(by_width), [str(width) for width in by_width])
            axes.minorticks_off()
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    for axes in charts[-1]:
        axes.set_xlabel("width")
    charts[-1, 0].legend(frameon=False, fontsize="x-small", loc="upper left")
    return encoded(figure, suffix)


def program() -> None:
    out, widths = Path(OUT.value), [int(width) for width in WIDTHS.value]
    check(out.suffix in (".png", ".svg"), f"--out={out} must end in .png or .svg")
    check(out.parent.is_dir(), f"--out={out}: {out.parent} is no directory; make it first")
    result = check_widths(config.build(CONFIG.value.values), widths)
    write_atomically(out, picture(result, out.suffix))
    print("\n\n".join(table(by_width, form) for form, by_width in result.items()))


def main(argv):
    programs.run(program, argv, "the models")


if __name__ == "__main__":
    app.run(main, flags_parser=programs.parse)
