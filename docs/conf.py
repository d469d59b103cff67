"""Sphinx builds docs/_build/html from the Markdown pages: make docs

The built site works without a network. The pages are plain Markdown, which a forge shows as they are: the table of contents is
made here, from the links of index.md.
"""

import re
from pathlib import Path

from sphinx.errors import SphinxError

project = "hybrid_attn"
author = "The hybrid-attn authors"
copyright = f"2026, {author}"
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = project
html_static_path, html_css_files = ["_static"], ["tables.css"]
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


LOADED = re.compile(
    r"<(?:script|img|iframe)[^>]*\bsrc=\"(?:https?:)?//[^>]*>|<link[^>]*rel=\"(?:stylesheet|preload)[^>]*//[^>]*>"
)


def check_offline(app, exception) -> None:
    """SphinxError for a page that would load a script, a style sheet or a picture from the network."""
    if exception is None and app.builder.format == "html":
        pages = {path: LOADED.findall(path.read_text()) for path in sorted(Path(app.outdir).rglob("*.html"))}
        loading = [f"{path.name}: {tag}" for path, tags in pages.items() for tag in tags]
        styles = [
            path.name for path in Path(app.outdir).rglob("*.css") if re.search(r"(?:url\(|@import)\W*https?:", path.read_text())
        ]
        if loading or styles:
            raise SphinxError(f"the pages load from the network: {'; '.join([*loading, *styles])}")


def setup(app) -> None:
    app.connect("build-finished", check_offline)
    app.connect("source-read", add_contents)
