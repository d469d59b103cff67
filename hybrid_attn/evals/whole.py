"""Files that are whole, or as they were before."""

from pathlib import Path


def write(path: Path, content: str | bytes) -> None:
    """Writes a file, and its directory if there is none; who is interrupted leaves nothing under the name.

    Half a surrogate pair, which a model may give and no file can hold, becomes a question mark.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))
    part.rename(path)
