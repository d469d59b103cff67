"""Sphinx builds docs/_build/html from the Markdown pages: make docs

The built site works without a network. The pages are plain Markdown, which a forge shows as they are: the table of contents is
made here, from the links of index.md. The pages of studies stand in studies/, beside their data, and Sphinx reads docs/ alone:
they are copied to docs/studies/, which git ignores, and links to them are changed to lead there.
"""

import re
import shutil
import sys
from pathlib import Path

from sphinx.errors import SphinxError

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))

from offline import from_network  # noqa: E402

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
STUDIES = DOCS.parent / "studies"
TO_STUDIES = re.compile(r"\]\(\.\./((?:\.\./)*studies/)")  # of a page in docs/, and of one in a folder there
TO_DOCS = re.compile(r"\]\(\.\./\.\./docs/")  # of the page of a study


def copy_studies(app) -> None:
    """The files of the studies, in the folders of docs/studies/ that their own have in studies/."""
    copies = DOCS / "studies"
    shutil.rmtree(copies, ignore_errors=True)
    for path in filter(Path.is_file, STUDIES.glob("[!_.]*/[!.]*")):  # all files: a page may link to any of them
        copy = copies / path.relative_to(STUDIES)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(TO_DOCS.sub("](../../", path.read_text()))
        shutil.copystat(path, copy)  # a page that has not changed is not built again


def contents(page: str) -> str:
    """A hidden table of contents for each heading of `page`, of the pages that are listed under it."""
    lines = []
    for line in page.splitlines():
        if match := CAPTION.fullmatch(line):
            lines += ["```", "", "```{toctree}", ":hidden:", f":caption: {match[1]}", ""]
        elif match := PAGE.fullmatch(line):
            lines.append(match[1])
    return "\n".join([*lines[2:], "```", ""])


def read_page(app, name: str, source: list[str]) -> None:
    source[0] = TO_STUDIES.sub(r"](\1", source[0])
    if name == "index":
        source[0] += "\n" + contents(source[0])


def check_offline(app, exception) -> None:
    """SphinxError for a page that would load a script, a style sheet or a picture from the network."""
    if exception is None and app.builder.format == "html":
        files = sorted(path for path in Path(app.outdir).rglob("*") if path.suffix in (".html", ".css", ".svg"))
        loading = [f"{path.relative_to(app.outdir)}: {address}" for path in files for address in from_network(path)]
        if loading:
            raise SphinxError(f"the pages load from the network: {'; '.join(loading)}")


def setup(app) -> None:
    app.connect("builder-inited", copy_studies)
    app.connect("source-read", read_page)
    app.connect("build-finished", check_offline)
