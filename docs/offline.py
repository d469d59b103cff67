"""What a page or a style sheet of the built site loads from the network: docs/conf.py refuses pages that load anything.

A reader of the site on a cluster without a network would wait for a font or a script, or miss a picture. Links that a reader
follows may lead anywhere.
"""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

LOADING = ("src", "poster", "data", "xlink:href")  # attributes of scripts, pictures, frames and objects
FOLLOWED = {"a", "area", "base"}  # tags with links; the href of others, such as image in SVG, is loaded
RELATIONS = {"stylesheet", "icon", "preload", "modulepreload", "prefetch", "preconnect", "dns-prefetch", "manifest"}
OF_STYLES = re.compile(r"""(?:url\(|@import)\s*["']?\s*([^\s"')]+)""")


class Loaded(HTMLParser):
    """The addresses that a browser loads by itself to show the HTML that it is fed."""

    def __init__(self):
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in FOLLOWED:
            return
        values = {name: value or "" for name, value in attrs}
        self.addresses += [values[name] for name in LOADING if name in values]
        self.addresses += [part.split()[0] for part in values.get("srcset", "").split(",") if part.strip()]
        self.addresses += OF_STYLES.findall(values.get("style", ""))
        relations = values.get("rel", "").lower().split()  # of a <link>, such as stylesheet, or canonical
        if "href" in values and (tag != "link" or not RELATIONS.isdisjoint(relations)):
            self.addresses.append(values["href"])


def from_network(path: Path) -> list[str]:
    """The addresses on other hosts that a file of the site, HTML, SVG or CSS, loads."""
    text = path.read_text()
    if path.suffix == ".css":
        addresses = OF_STYLES.findall(text)
    else:
        loaded = Loaded()
        loaded.feed(text)
        addresses = loaded.addresses
    return [address for address in addresses if urlsplit(address).netloc]
