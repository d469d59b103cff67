"""Sphinx builds docs/_build/html from the Markdown pages: make docs

The pages are plain Markdown, which a forge shows as they are: the table of contents is made here, from the links of index.md.
"""

import re

project = "hybrid_attn"
author = "The hybrid-attn authors"
copyright = f"2026, {author}"
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = project
myst_heading_anchors = 3  # links to headings, as forges make them

CAPTION = re.compile(r"## (.+)")
PAGE = re.compile(r"- \[.+\]\((.+)\.md\)")


def contents(page: str) -> str:
    """A hidden table of contents for each heading of `page`, of the pages that are listed under it."""
    lines = []
    for line in page.splitlines():
        if match := CAPTION.fullmatch(line):
            lines += ["```", "", "```{toctree}", ":hidden:", f":caption: {match[1]}", ""]
        elif match := PAGE.fullmatch(line):
            lines.append(match[1])
    return "\n".join([*lines[2:], "```", ""])


def add_contents(app, name: str, source: list[str]) -> None:
    if name == "index":
        source[0] += "\n" + contents(source[0])


def setup(app) -> None:
    app.connect("source-read", add_contents)
