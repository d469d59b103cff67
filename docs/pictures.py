"""Draws the pictures of the guide, docs/pictures/*.svg: python docs/pictures.py

masks: the keys that a query sees in each layer of a period. exchange: what a context shard receives by halo and by ring, and
zigzag order. stages: the length, the batch and the rate of a run that extends. caches: the bytes of KV caches by length, which
the code computes.
"""

import math
import sys
from pathlib import Path

from drawing import arrow, box, picture, square, text

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 640
DOCUMENTS, WINDOW, CELL = (7, 5), 3, 11  # tokens of the documents of a sequence, keys of the window, pixels of a cell
SHARDS = 4
LAYOUTS = {"R": "full attention", "LG": "LG", "LLLG": "LLLG", "LLLLLLLG": "7:1"}  # and the names of their curves
LENGTHS = [2**power for power in range(13, 21)]


def mask(x: float, y: float, window: int, keys: str) -> list[str]:
    """The keys (right) that each query (down) sees: those of its own document, in its window."""
    document = [i for i, tokens in enumerate(DOCUMENTS) for _ in range(tokens)]
    return [
        square(x + CELL * k, y + CELL * q, CELL, keys if document[q] == document[k] and q - window < k <= q else "cell")
        for q in range(len(document))
        for k in range(len(document))
    ]


def masks() -> str:
    side, gap = CELL * sum(DOCUMENTS), 23
    parts = [text(20, 32, "Keys that a query sees in the layers of LLLG", "ink title", "start")]
    for i, letter in enumerate("LLLG"):
        x, keys = 20 + i * (side + gap), "global" if letter == "G" else "local"
        parts += mask(x, 70, sum(DOCUMENTS) if letter == "G" else WINDOW, keys)
        parts.append(text(x + side / 2, 60, f"{letter}  {'NoPE' if letter == 'G' else 'RoPE'}", f"{keys} title"))
    parts.append(
        text(
            20, 228, "rows: queries; columns: keys. One sequence packs two documents, of 7 and 5 tokens.", "ink small", "start"
        )
    )
    parts.append(
        text(20, 248, "A local layer sees the last 3 keys of the document here, a global one all before.", "ink small", "start")
    )
    return picture(WIDTH, 266, "The masks of a local and of a global layer over two documents", parts)


def shards(y: float, labels: list[str], fill: str = "plain") -> list[str]:
    return [box(20 + 152 * i, y, 128, 40, label, fill) for i, label in enumerate(labels)]


def halo(y: float) -> list[str]:
    """Each shard sends its last keys to the next one."""
    parts = [text(20, y, "Local layers: halo", "local title", "start"), *shards(y + 14, [f"shard {i}" for i in range(SHARDS)])]
    for i in range(SHARDS - 1):
        x = 20 + 152 * i
        parts += [square(x + 108, y + 15.5, 21.5, "local"), square(x + 108, y + 32.5, 21.5, "local")]
        parts.append(arrow((x + 128, y + 34), (x + 150, y + 34)))
    return [*parts, text(20, y + 76, "A shard receives the keys of one window from the shard before it.", "ink small", "start")]


def ring(y: float) -> list[str]:
    """The keys of every shard go once around."""
    parts = [text(20, y, "Global layers: ring", "global title", "start")]
    for turn in range(3):
        labels = [f"keys of {(i - turn) % SHARDS}" for i in range(SHARDS)]
        parts += shards(y + 14 + 52 * turn, labels, "globalfill")
    for i in range(SHARDS - 1):
        parts.append(arrow((84 + 152 * i, y + 56), (84 + 152 * (i + 1), y + 64)))
    parts.append(
        text(
            20,
            y + 184,
            "Rows are the first three of four rounds: a shard computes with its keys and passes them on.",
            "ink small",
            "start",
        )
    )
    return [*parts, text(20, y + 204, "With gather it receives the keys of all shards at once.", "ink small", "start")]


def zigzag(y: float) -> list[str]:
    """Shard i has the slices i and 2 * SHARDS - 1 - i of the sequence."""
    order = [*range(SHARDS), *reversed(range(SHARDS))]
    parts = [text(20, y, "Zigzag order", "ink title", "start")]
    parts += [
        box(20 + 75 * i, y + 14, 68, 36, f"shard {shard}", "localfill" if shard else "globalfill")
        for i, shard in enumerate(order)
    ]
    return [
        *parts,
        text(
            20,
            y + 72,
            "The sequence in slices: each shard has an early and a late one, so causal work is equal.",
            "ink small",
            "start",
        ),
    ]


def exchange() -> str:
    parts = [*halo(32), *ring(148), *zigzag(392)]
    return picture(WIDTH, 482, "What context shards exchange: halo, ring, and zigzag order", parts)


def stages() -> str:
    """A run of three stages, as configs/extend.py makes them: four times the length, and the same tokens in a step."""
    columns = [
        ("pretraining", "8,192", "16", 46, 330),
        ("extension", "32,768", "4", 92, 120),
        ("extension", "131,072", "1", 138, 120),
    ]
    parts, x, bottom = [text(20, 32, "Stages of one run", "ink title", "start")], 20.0, 216
    for i, (name, length, batch, height, width) in enumerate(columns):
        parts.append(box(x, bottom - height, width, height, "", "globalfill" if i else "localfill"))
        parts.append(text(x + width / 2, bottom - height / 2 + 5, f"{length} tokens"))
        parts.append(text(x + width / 2, bottom - height - 10, name, "ink small"))
        parts.append(text(x + width / 2, bottom + 20, f"batch {batch}", "faint small"))
        x += width + 15
    rate = [
        (20, 330),
        (50, 262),
        (240, 262),
        (350, 318),
        (365, 330),
        (377, 312),
        (485, 328),
        (500, 330),
        (512, 312),
        (620, 328),
    ]
    parts.append('<path d="M' + " L".join(f"{a:g} {b:g}" for a, b in rate) + '" class="line"/>')
    parts.append(text(60, 282, "learning rate", "faint small", "start"))
    note = "The height of a box is the logarithm of the length. The tokens of a step stay the same."
    return picture(WIDTH, 380, "Three stages of growing length", [*parts, text(20, 362, note, "ink small", "start")])


def cache_gib() -> dict[str, list[float]]:
    """GiB of the KV cache of the 8B model in bfloat16, by layout, at each of LENGTHS."""
    sys.path.insert(0, str(ROOT))
    from configs import hybrid_8k
    from hybrid_attn import config
    from hybrid_attn.configs import base
    from hybrid_attn.model import flops

    kinds = {"L": base.kind(window=4096, rope_theta=1e4), "R": base.kind(rope_theta=1e4), "G": base.kind()}
    curves = {}
    for pattern in LAYOUTS:
        letters = {letter: kinds[letter] for letter in sorted(set(pattern))}
        model = config.build(hybrid_8k.with_layers("8b", pattern, **letters)).model
        curves[pattern] = [flops.cache_bytes(model, S) / 2**30 for S in LENGTHS]
    return curves


def caches() -> str:
    def at(length: float, gib: float) -> tuple[float, float]:
        return 70 + 440 * math.log2(length / LENGTHS[0]) / 7, 290 - 28 * math.log2(gib / 0.5)

    parts = [text(20, 32, "KV cache of the 8B model, GiB of one sequence in bfloat16", "ink title", "start")]
    for power in range(-1, 8, 2):
        parts.append(text(58, at(LENGTHS[0], 2.0**power)[1] + 5, f"{2.0**power:g}", "faint small", "end"))
        parts.append(f'<path d="M66 {at(1, 2.0**power)[1]:g} H510" class="line" stroke-opacity="0.35"/>')
    for length in LENGTHS[::2] + LENGTHS[-1:]:
        parts.append(text(at(length, 1)[0], 314, f"{length // 1024}K", "faint small"))
    for i, (pattern, gib) in enumerate(cache_gib().items()):
        points = [at(*point) for point in zip(LENGTHS, gib, strict=True)]
        color = "ink" if i == 0 else "global" if pattern == "LLLG" else "local"
        path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(f'<path d="{path}" class="curve" style="stroke: var(--{color})"/>')
        parts.append(text(520, points[-1][1] + 5, LAYOUTS[pattern], f"{color} small", "start"))
    parts.append("<style>.curve { fill: none; stroke-width: 2.2; }</style>")
    parts.append(text(20, 342, "tokens, window 4,096; both axes are logarithmic", "faint small", "start"))
    return picture(WIDTH, 360, "Bytes of the KV cache by length for four layouts", parts)


PICTURES = {"masks": masks, "exchange": exchange, "stages": stages, "caches": caches}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (Path(__file__).parent / "pictures" / f"{name}.svg").write_text(draw())
