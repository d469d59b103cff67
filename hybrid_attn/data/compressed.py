"""Files as streams of bytes, with .gz and .zst decompressed. A read needs little more memory than what it returns."""

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator

SUFFIXES = (".gz", ".zst")
ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)  # of a compressed file that is damaged or truncated
BUFFER = 2**20
# The format of .zst (RFC 8878): the magic numbers of its two kinds of frame, and the sizes of two fields of a frame header.
FRAME, SKIPPABLE = b"\x28\xb5\x2f\xfd", b"\x2a\x4d\x18"
DICTIONARY_BYTES, CONTENT_BYTES = (0, 1, 2, 4), (0, 2, 4, 8)
RLE = 1  # type of a block whose content is one byte, repeated


def opened(path: str) -> contextlib.AbstractContextManager[io.BufferedIOBase]:
    """The content of a file, decompressed if its suffix is .gz or .zst; ImportError if the library for .zst is missing."""
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".zst"):
        return io.BufferedReader(_Blocks(_zst_blocks(path)), BUFFER)
    return open(path, "rb", BUFFER)


def library(name: str, path: str):
    """Imports the module `name` and returns its package."""
    try:
        return __import__(name)
    except ImportError as error:
        raise ImportError(f"{path} needs the library {name.partition('.')[0]}; pip install 'hybrid_attn[data]'") from error


def _zst_blocks(path: str) -> Iterator[bytes]:
    """The content of a .zst file, at most 128 KiB at a time; zlib.error where it is damaged or truncated.

    The decompressor gets one block at a time, because it does not limit what it returns: 4 bytes can decompress to 128 KiB.
    """
    zstandard = library("zstandard", path)
    with open(path, "rb", BUFFER) as file:
        while magic := file.read(4):
            if magic[1:] == SKIPPABLE and magic[0] >> 4 == 5:
                if size := int.from_bytes(_exactly(file, 4), "little"):
                    file.seek(size - 1, io.SEEK_CUR)
                    _exactly(file, 1)  # because seek passes the end without an error
                continue
            frame = zstandard.ZstdDecompressor().decompressobj()
            for piece in _frame_pieces(file, magic):
                try:
                    yield frame.decompress(piece)
                except zstandard.ZstdError as error:
                    raise zlib.error(str(error)) from error


def _frame_pieces(file: io.BufferedReader, magic: bytes) -> Iterator[bytes]:
    """The header, the blocks and the checksum of the frame that begins with `magic`, in the order of the file."""
    if magic != FRAME:
        raise zlib.error(f"no frame of zstd begins with the bytes {magic.hex()}")
    descriptor = _exactly(file, 1)
    single_segment, checksum = descriptor[0] >> 5 & 1, descriptor[0] >> 2 & 1
    content = CONTENT_BYTES[descriptor[0] >> 6] or single_segment
    yield magic + descriptor + _exactly(file, (1 - single_segment) + DICTIONARY_BYTES[descriptor[0] & 3] + content)
    last = False
    while not last:
        header = _exactly(file, 3)
        fields = int.from_bytes(header, "little")
        last, block_type, size = fields & 1, fields >> 1 & 3, fields >> 3
        yield header + _exactly(file, 1 if block_type == RLE else size)
    if checksum:
        yield _exactly(file, 4)


def _exactly(file: io.BufferedReader, size: int) -> bytes:
    content = file.read(size)
    if len(content) < size:
        raise zlib.error("it ends within a frame")
    return content


class _Blocks(io.RawIOBase):
    """A file with the content of `blocks`."""

    def __init__(self, blocks: Iterator[bytes]):
        self._blocks = blocks
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._left:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._left = memoryview(block)
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size
