"""What layouts of one model cost, as tables in Markdown: the KV cache, training and decoding. Nothing is run.

python tools/compare_layouts.py --config=configs/hybrid_8k.py:8b
python tools/compare_layouts.py --config=configs/hybrid_8k.py:8b --lengths=8K,256K --layouts=R,LG,LLLG,LLLG/1024

A layout is a pattern of three letters, with a window behind a slash. L is the layer type of the config that has a window. R is
the same without it: full attention with RoPE. G is the NoPE layer type of the config, or R without RoPE. Depth and widths are
those of the config. Exit code: 2 for a wrong flag or config.
"""

import dataclasses
import re
from collections.abc import Callable

from absl import app, flags

from hybrid_attn import config, config_file, programs
from hybrid_attn.bench.machine import GIB
from hybrid_attn.bench.measurement import lengths, table
from hybrid_attn.config import Model, Table
from hybrid_attn.model import flops
from hybrid_attn.trees import check

CONFIG = config_file.define("config", None, "Config file, with its argument after a colon.", config.Config)
flags.mark_flag_as_required("config")
LENGTHS = flags.DEFINE_list("lengths", ["8K", "128K", "1024K"], "Tokens of a sequence, 8192, 8K or 1M.")
USUAL = ["R", "RG", "LG", "LLLG/512", "LLLG/1024", "LLLG/2048", "LLLG/4096", "LLLG/8192", "LLLLLLLG"]
LAYOUTS = flags.DEFINE_list("layouts", USUAL, "Patterns of L, R and G; LLLG/1024 has another window than the config.")
QUANTITIES: dict[str, Callable[[Model, int], float]] = {
    "KV cache of a sequence, GiB in bfloat16": lambda model, S: flops.cache_bytes(model, S) / GIB,
    "training, GFLOPs a token": lambda model, S: flops.train_flops_per_token(model, S) / 1e9,
    "decoding after so many tokens, GFLOPs a token": lambda model, S: flops.decode_flops(model, S) / 1e9,
}


def layer_types(model: Model) -> dict:
    """The layer types of L, R and G."""
    windowed = [kind for kind in model.kinds.values() if kind.window]
    check(len(windowed) == 1, f"--config has {len(windowed)} layer types with a window; a comparison needs one")
    full = dataclasses.replace(windowed[0], window=None)
    nope = [kind for kind in model.kinds.values() if kind.rope_theta is None and not (kind.window or kind.chunk)]
    return {"L": windowed[0], "R": full, "G": (nope or [dataclasses.replace(full, rope_theta=None)])[0]}


def with_layout(model: Model, layout: str) -> Model:
    """`model` with the layers of a pattern such as LLLG, or LLLG/1024 with that window."""
    matched = re.fullmatch(r"([LRG]+)(?:/([1-9]\d*))?", layout)
    check(bool(matched), f"--layouts has {layout!r}; write patterns of L, R and G, as LLLG or LLLG/1024")
    pattern, window = matched.groups()
    kinds = layer_types(model)
    if window:
        kinds["L"] = dataclasses.replace(kinds["L"], window=int(window))
    kinds = Table({letter: kinds[letter] for letter in sorted(set(pattern))})
    return dataclasses.replace(model, prefix="", pattern=pattern, kinds=kinds)


def name_of(model: Model) -> list[str]:
    """The cells of the layers and of the window of a row."""
    windows = {kind.window for kind in model.kinds.values() if kind.window}
    return [model.pattern, *[f"{window:,}" for window in windows]] if windows else [model.pattern, "all keys"]


def tables(model: Model, layouts: list[str], tokens: list[int]) -> str:
    """A table for each quantity; a cell also has the share of the first layout."""
    models = [with_layout(model, layout) for layout in layouts]
    parts = []
    for title, quantity in QUANTITIES.items():
        first = [quantity(models[0], S) for S in tokens]
        rows = [
            [*name_of(x), *(f"{quantity(x, S):,.3f} ({quantity(x, S) / y:.0%})" for S, y in zip(tokens, first, strict=True))]
            for x in models
        ]
        parts += [f"{title}:", table(["layers", "window", *(f"{S:,} tokens" for S in tokens)], rows)]
    return "\n\n".join(parts)


def show() -> None:
    print(tables(config.build(CONFIG.value.values).model, LAYOUTS.value, lengths(LENGTHS.value)))


def main(argv):
    programs.run(show, argv)


if __name__ == "__main__":
    app.run(main, flags_parser=programs.parse)
