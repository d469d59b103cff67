"""Files as streams of bytes, with .gz and .zst decompressed. A read needs little more memory than what it returns."""

import contextlib
import gzip
import io
import zlib

SUFFIXES = (".gz", ".zst")
ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)  # of a compressed file that is damaged or truncated
BUFFER = 2**20


def opened(path: str) -> contextlib.AbstractContextManager[io.BufferedIOBase]:
    """The content of a file, decompressed if its suffix is .gz or .zst; ImportError if the library for .zst is missing."""
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".zst"):
        return io.BufferedReader(_ZstFile(path), BUFFER)
    return open(path, "rb", BUFFER)


def library(name: str, path: str):
    """Imports the module `name` and returns its package."""
    try:
        return __import__(name)
    except ImportError as error:
        raise ImportError(f"{path} needs the library {name.partition('.')[0]}; pip install 'hybrid_attn[data]'") from error


class _ZstFile(io.RawIOBase):
    """The content of a .zst file, of any number of frames; zlib.error where it is damaged or truncated.

    The library zstandard would not notice that a file ends within a frame.
    """

    def __init__(self, path: str):
        self._stream = library("pyarrow", path).input_stream(path, compression="zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            content = self._stream.read(len(buffer))
        except OSError as error:
            if error.errno is not None:  # of the disk, not of the library
                raise
            raise zlib.error(str(error)) from error
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()
