"""Files and directories: written atomically, appended to, renamed, locked by one process at a time; JSON objects."""

import contextlib
import errno
import fcntl
import itertools
import json
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from hybrid_attn.trees import check

LOCK = ".lock"
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # errors of network disks without locks
IMPORTED_FILES = "companions"  # the folder beside an imported checkpoint: tokenizer and config files of the original model
JSON_BYTES = 2**26  # the index of a model of 700B parameters takes 9 MB


def check_named(flag: str, path: str | os.PathLike, value: str) -> None:
    """ValueError where a flag is empty: its path would be the current directory. The cure asks for `value`: "a new file"."""
    check(bool(os.fspath(path).strip()), f"--{flag}= is empty; name {value}")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file and creates its directory; after an interruption the old file, or none, is there. Links are replaced.

    Half a surrogate pair, which a model may generate and UTF-8 cannot encode, becomes a question mark.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), opened_atomically(path) as file:
        file.write(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))


@contextlib.contextmanager
def opened_atomically(path: Path, ending: str = "part") -> Iterator[BinaryIO]:
    """A new file, `.NAME.ending` until the end of the body and then `path`; after an error the old file, or none, is there.

    Processes that may write the same file at the same time need different endings.
    """
    part = path.with_name(f".{path.name}.{ending}")  # hidden, because NAME.part may be a file of the user
    part.unlink(missing_ok=True)
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # before the rename: the machine may lose power
        part.rename(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds `path` to an OSError of the body: that of a full disk has no file name."""
    try:
        yield
    except OSError as cause:
        raise type(cause)(cause.errno, cause.strerror, str(path)) from cause


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Creates `directory` and locks it for this process until the context ends; BlockingIOError names another holder.

    `.lock` names the holder. The operating system releases the lock of a process that dies, so no lock is stale. A disk without
    locks is used with a warning. ValueError where `.lock` is a link, because the file is emptied later.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(_open_lock(directory / LOCK), "r+", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.readline(1000).strip() or "another process"
            cure = "wait until that ends, or use another directory"
            raise BlockingIOError(f"{directory} is in use by {holder}; {cure}") from None
        except OSError as cause:
            if cause.errno not in WITHOUT_LOCKS:
                raise
            logging.warning("%s is on a disk without locks: no other process may use it meanwhile", directory)
        command = shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])[:500]
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}: {command}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _open_lock(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as cause:
        check(cause.errno != errno.ELOOP, f"{path} is a link, and this program makes none; remove it")
        raise


def set_aside(path: Path) -> Path:
    """Renames a file or a directory to the first free name of `NAME.old`, `NAME.old1`, …, and returns it."""
    target = free_name(path, "old")
    path.rename(target)
    return target


def free_name(path: Path, ending: str) -> Path:
    """The first of `NAME.ending`, `NAME.ending1`, … that does not exist."""
    names = (path.with_name(f"{path.name}.{ending}{n or ''}") for n in itertools.count())
    return next(name for name in names if not name.exists())


class Appended:
    """A file to append to; bytes that could not be written are written with the next ones."""

    def __init__(self, path: Path):
        self.path, self._unwritten = path, b""
        self._open()

    def write(self, content: bytes) -> bool:
        """Appends `content`; after an OSError the file is as it was before.

        True if the file had been removed or replaced: all of it is written again, and another file of its name is renamed.
        """
        self._unwritten += content
        restored = self._restore_if_removed()
        size = os.fstat(self._number).st_size
        with naming(self.path):
            try:
                remaining = memoryview(self._unwritten)
                while remaining:
                    remaining = remaining[os.write(self._number, remaining) :]
            except OSError:
                os.ftruncate(self._number, size)
                raise
        self._unwritten = b""
        return restored

    def close(self) -> None:
        os.close(self._number)

    def _open(self) -> None:
        self._number = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)

    def _restore_if_removed(self) -> bool:
        ours = os.fstat(self._number)
        with contextlib.suppress(FileNotFoundError):
            current = self.path.stat()
            if (current.st_dev, current.st_ino) == (ours.st_dev, ours.st_ino):
                return False
            set_aside(self.path)
        write_atomically(self.path, os.pread(self._number, ours.st_size, 0))
        os.close(self._number)
        self._open()
        return True


def read_object(path: Path, cure: str = "") -> dict:
    """The object of a JSON file; ValueError, with its name and `cure`, if it is missing, invalid, too large or too deep."""
    check(path.exists(), f"{path.parent} has no {path.name}")
    try:
        check(path.is_file(), "it is no file")  # a pipe would keep its reader waiting
        size = path.stat().st_size
        check(size <= JSON_BYTES, f"it has {size:,} bytes, and at most {JSON_BYTES:,} are read")
        content = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as cause:
        raise ValueError(f"{path} is not JSON: {cause}{cure}") from cause
    return object_of(content, str(path), cure)


def object_of(content: str | bytes, where: str, cure: str = "", **numbers: Callable[[str], object]) -> dict:
    """The object of a JSON text; `numbers` are json.loads' hooks for numbers. ValueError names `where` and ends with `cure`."""
    try:
        values = json.loads(content, **numbers)
    except RecursionError as cause:
        raise ValueError(f"{where} is nested too deeply to be read{cure}") from cause
    except ValueError as cause:
        raise ValueError(f"{where} is not JSON: {cause}{cure}") from cause
    check(isinstance(values, dict), f"{where} must hold an object and holds a {type(values).__name__}{cure}")
    return values
