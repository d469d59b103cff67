"""What the scripts of the pictures share: colours, text, boxes, arrows, and the frame of an SVG.

A picture has a background of its own and two palettes, of which the reader's colour scheme chooses one, so that it reads on
light and on dark pages. The same code draws the same bytes.
"""

from xml.sax.saxutils import escape

PALETTES = {
    "light": {
        "page": "#ffffff", "ink": "#1f2328", "faint": "#59636e", "line": "#8c959f", "cell": "#eaeef2",
        "local": "#0969da", "global": "#bc4c00", "plain": "#f6f8fa", "localfill": "#ddf4ff", "globalfill": "#fff1e5",
    },
    "dark": {
        "page": "#161b22", "ink": "#f0f6fc", "faint": "#b1bac4", "line": "#7d8590", "cell": "#2d333b",
        "local": "#58a6ff", "global": "#f0883e", "plain": "#21262d", "localfill": "#12325c", "globalfill": "#4d2a10",
    },
}  # fmt: skip


def palette(name: str) -> str:
    return "svg { " + " ".join(f"--{key}: {color};" for key, color in PALETTES[name].items()) + " }"


def style() -> str:
    fills = "".join(f".{key} {{ fill: var(--{key}); }}\n" for key in PALETTES["light"])
    return (
        f"<style>\n{palette('light')}\n@media (prefers-color-scheme: dark) {{ {palette('dark')} }}\n{fills}"
        "text { font-family: system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; font-size: 14px; }\n"
        ".small { font-size: 12.5px; }\n.title { font-size: 16px; font-weight: 600; }\n"
        ".line { stroke: var(--line); stroke-width: 1.5; fill: none; }\n"
        ".box { stroke: var(--line); stroke-width: 1.2; }\n</style>"
    )


def text(x: float, y: float, label: str, classes: str = "ink", anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{classes}" text-anchor="{anchor}">{escape(label)}</text>'


def box(x: float, y: float, width: float, height: float, label: str, fill: str = "plain") -> str:
    shape = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" class="box {fill}"/>'
    return shape + text(x + width / 2, y + height / 2 + 5, label)


def arrow(*points: tuple[float, float]) -> str:
    path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
    return f'<path d="{path}" class="line" marker-end="url(#head)"/>'


def square(x: float, y: float, side: float, fill: str) -> str:
    """A cell of a picture of a mask, with a gap to the next."""
    return f'<rect x="{x:g}" y="{y:g}" width="{side - 1.5:g}" height="{side - 1.5:g}" rx="2" class="{fill}"/>'


def picture(width: int, height: int, title: str, parts: list[str]) -> str:
    """An SVG of `parts` in a frame; `title` is what a screen reader says."""
    head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    head += '<path d="M0 0.5 L8 4 L0 7.5 z" class="head"/></marker>'
    frame = f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="10" class="box page"/>'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">'
    styles = style().replace("</style>", ".head { fill: var(--line); }\n</style>")
    title = f"<title>{escape(title)}</title>"
    return "\n".join([opening, title, styles, f"<defs>{head}</defs>", frame, *parts, "</svg>"]) + "\n"
