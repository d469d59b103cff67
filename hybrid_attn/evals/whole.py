"""Files that are whole, or as they were before."""

import os
from pathlib import Path


def write(path: Path, content: str | bytes) -> None:
    """Writes a file, and its directory if there is none; who is interrupted leaves nothing under the name.

    Half a surrogate pair, which a model may give and no file can hold, becomes a question mark.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))
        file.flush()
        os.fsync(file.fileno())  # before the name is given, for a machine may lose its power
    part.rename(path)
