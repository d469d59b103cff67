"""Draws docs/architecture.svg: python docs/architecture.py

The picture shows a stack of layers of the pattern LLLG, one parallel block, and which keys a query of each layer type sees.
It needs nothing beyond Python.
"""

from pathlib import Path

from drawing import arrow, box, picture, square, text

WIDTH, HEIGHT = 960, 500
TOKENS, WINDOW, CELL = 12, 4, 13  # of the two pictures of a mask: tokens, keys of the window, pixels of a cell


def stack(x: float) -> list[str]:
    """The model from tokens (below) to logits (above)."""
    middle, width = x + 85, 170
    parts = [text(middle, 46, "The model", "ink title"), box(x, 68, width, 32, "logits"), box(x, 118, width, 32, "final norm")]
    for i, (letter, keys) in enumerate([("G", "global"), ("L", "local"), ("L", "local"), ("L", "local")]):
        parts.append(box(x, 190 + 44 * i, width, 34, f"{letter}   {keys} layer", f"{keys}fill"))
    parts.append(f'<rect x="{x - 14:g}" y="178" width="{width + 28}" height="190" rx="8" class="line" stroke-dasharray="5 4"/>')
    parts += [box(x, 408, width, 32, "embedding"), text(middle, 472, "tokens of a packed sequence", "faint small")]
    parts.append(text(x + width + 24, 278, "× n", "ink title", "start"))
    edges = [(118, 100), (178, 150), (408, 368), (458, 440)]
    edges += [(234 + 44 * i, 224 + 44 * i) for i in range(3)]
    return parts + [arrow((middle, low), (middle, high + 3)) for low, high in edges]


def block(x: float) -> list[str]:
    """A parallel block: one norm, and attention and feed-forward of the same input."""
    left, right, middle = x + 62, x + 188, x + 125
    parts = [text(middle, 46, "A layer", "ink title"), text(middle, 66, "(model.block = parallel)", "faint small")]
    parts.append(f'<circle cx="{middle:g}" cy="112" r="13" class="box plain"/>' + text(middle, 117, "+"))
    parts += [box(x, 168, 124, 34, "output"), box(x, 222, 124, 34, "attention")]
    parts += [box(x, 276, 124, 34, "QK-norm, RoPE"), box(x, 330, 124, 34, "q, k, v")]
    parts += [box(x + 140, 222, 104, 88, "feed-forward"), text(right + 4, 290, "gated", "faint small")]
    parts += [box(x + 60, 394, 130, 32, "norm"), arrow((left, 168), (left, 112), (middle - 16, 112))]
    parts += [arrow((left, 222), (left, 205)), arrow((left, 276), (left, 259)), arrow((left, 330), (left, 313))]
    parts += [arrow((right + 4, 222), (right + 4, 112), (middle + 16, 112))]
    parts += [arrow((middle - 35, 394), (middle - 35, 380), (left, 380), (left, 367))]
    parts += [arrow((middle + 35, 394), (middle + 35, 380), (right + 4, 380), (right + 4, 313))]
    parts += [arrow((middle, 456), (middle, 429)), arrow((middle, 99), (middle, 80))]
    residual = arrow((middle, 444), (x + 262, 444), (x + 262, 88), (middle + 24, 88), (middle + 9, 100))
    return [*parts, residual, text(middle, 472, "residual stream", "faint small")]


def mask(x: float, y: float, window: int, keys: str) -> list[str]:
    """A square of queries (down) by keys (right): a query sees the coloured ones."""
    parts = []
    for query in range(TOKENS):
        for key in range(TOKENS):
            fill = keys if query - window < key <= query else "cell"
            parts.append(square(x + CELL * key, y + CELL * query, CELL, fill))
    return parts


def layer_type(y: float, x: float, keys: str, title: str, lines: list[str], window: int) -> list[str]:
    side = x + TOKENS * CELL + 18
    parts = [*mask(x, y, window, keys), text(side, y + 14, title, f"{keys} title", "start")]
    return parts + [text(side, y + 40 + 21 * i, line, "ink small", "start") for i, line in enumerate(lines)]


def draw() -> str:
    local = ["keys: the last W", "positions: RoPE", "time and memory: S · W", "KV cache: W tokens", "context shards: halo of W"]
    everything = ["keys: all up to its own", "positions: none (NoPE)", "QK-norm, if chosen", "KV cache: all tokens"]
    everything += ["context shards: gather,", "ring or Ulysses"]
    parts = [*stack(40), *block(310)]
    parts += layer_type(68, 612, "local", "L  local", local, WINDOW)
    parts += layer_type(272, 612, "global", "G  global", everything, TOKENS)
    parts.append(text(612, 46, "Keys that a query sees", "ink title", "start"))
    parts.append(text(612, 472, "rows: queries; columns: keys", "faint small", "start"))
    title = "A model of the pattern LLLG: three local layers to one global layer"
    return picture(WIDTH, HEIGHT, title, parts)


if __name__ == "__main__":
    Path(__file__).with_name("architecture.svg").write_text(draw())
