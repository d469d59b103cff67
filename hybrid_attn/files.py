"""Files and directories: written atomically, held by one process at a time."""

import contextlib
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"
JSON_BYTES = 2**26  # the index of a model of 700B parameters takes 9 MB


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file atomically, and creates its directory; after an interruption the old content, or no file, is there.

    Half a surrogate pair, which a model may generate and UTF-8 cannot encode, becomes a question mark.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))
        file.flush()
        os.fsync(file.fileno())  # before the rename: the machine may lose power
    part.rename(path)


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Holds `directory`, which it creates, for this process until the context ends; BlockingIOError names another holder.

    The holder is written to `.lock`. The operating system releases the lock of a process that dies, so no lock is stale.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.readline(1000).strip() or "another process"
            raise BlockingIOError(
                f"{directory} is in use by {holder}; wait until that ends, or use another directory"
            ) from None
        command = shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])[:500]
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}: {command}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def read_object(path: Path) -> dict:
    """The object that a JSON file holds; ValueError with its name if there is none, or if it is too large or too deep."""
    if not path.exists():
        raise ValueError(f"{path.parent} has no {path.name}")
    try:
        if not path.is_file():  # a pipe would keep its reader waiting
            raise ValueError("it is no file")
        if path.stat().st_size > JSON_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, and at most {JSON_BYTES:,} are read")
        values = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as cause:
        raise ValueError(f"{path} is nested too deeply to be read") from cause
    except (OSError, ValueError) as cause:
        raise ValueError(f"{path} is not JSON: {cause}") from cause
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object and holds a {type(values).__name__}")
    return values
