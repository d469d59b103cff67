"""Text in tables: Parquet files, and streams of Arrow batches as the library datasets saves them."""

from collections.abc import Iterable, Iterator

from hybrid_attn.data import records
from hybrid_attn.data.compressed import library
from hybrid_attn.data.records import Broken, Fields, Text

BATCH = 256  # rows of a table in memory at a time


def parquet(path: str, fields: Fields, max_bytes: int) -> Iterator[Text | Broken]:
    """The documents of a Parquet file. It is not read if the rows of a row group have more than `max_bytes` on average."""
    pyarrow = library("pyarrow.parquet", path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _columns(path, file.schema_arrow.names, fields)
            mean = _mean_bytes(file.metadata, columns)
            if mean > max_bytes:
                too_long = f"{path}: a row group has rows of {mean:,} bytes on average, more than {records.limit(max_bytes)}"
                yield Broken(too_long, too_long=True)
                return
            rows = max(1, min(BATCH, max_bytes // max(1, mean)))
            yield from _rows(path, fields, max_bytes, file.iter_batches(rows, columns=columns))
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:  # column names may not be UTF-8
        _stop_if_unreadable(error)
        yield Broken(f"{path}: not Parquet: {' '.join(str(error).split())}")


def arrow(path: str, fields: Fields, max_bytes: int) -> Iterator[Text | Broken]:
    """The documents of a stream of Arrow batches."""
    pyarrow = library("pyarrow.ipc", path)

    def batches(stream, columns: list[str]) -> Iterator:
        for batch in stream:
            batch = batch.select(columns)
            for column in batch.columns:
                _check_offsets(column)
            yield from (batch.slice(first, BATCH) for first in range(0, len(batch), BATCH))

    try:
        with pyarrow.memory_map(path) as file, pyarrow.ipc.open_stream(file) as stream:
            columns = _columns(path, stream.schema.names, fields)
            yield from _rows(path, fields, max_bytes, batches(stream, columns))
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:  # column names may not be UTF-8
        _stop_if_unreadable(error)
        yield Broken(f"{path}: not a stream of Arrow batches: {error}")


def _mean_bytes(metadata, columns: list[str]) -> int:
    """Decompressed bytes per row of `columns`, in the row group with the largest mean."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return max((_group_bytes(group, columns) // max(1, group.num_rows) for group in groups), default=0)


def _group_bytes(group, columns: list[str]) -> int:
    parts = [group.column(i) for i in range(group.num_columns)]
    return sum(part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] in columns)


def _check_offsets(column) -> None:
    """ArrowInvalid if a column refers to memory outside its buffers: the library would read there and may crash."""
    try:
        column.validate(full=True)
    except ValueError as error:
        if "UTF8" not in str(error) or str(column.type) not in ("string", "large_string"):
            raise  # `_rows` names the rows that are merely not UTF-8


def _rows(path: str, fields: Fields, max_bytes: int, batches: Iterable) -> Iterator[Text | Broken]:
    number = 0
    for batch in batches:
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:
            rows = (batch.slice(i, 1) for i in range(len(batch)))  # to find the row
        for row in rows:
            number += 1
            try:
                document = records.document(row if isinstance(row, dict) else row.to_pylist()[0], fields)
            except ValueError as error:
                yield Broken(f"{path}, row {number}: {records.reason(error)}")
                continue
            too_long = f"{path}, row {number}: it has {len(document.text):,} bytes, more than {records.limit(max_bytes)}"
            yield document if len(document.text) <= max_bytes else Broken(too_long, too_long=True)


def _stop_if_unreadable(error: Exception) -> None:
    """Raises an error of the operating system again. An OSError of the library itself has no errno."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def _columns(path: str, names: list[str], fields: Fields) -> list[str]:
    """The columns of a table to read; ValueError if one is missing. `records.document` refuses that of `fields.loss`."""
    needed, refused = (
        {name if name in names else name.split(".")[0] for name in group if name is not None}
        for group in ((fields.text, fields.label), (fields.loss,))
    )
    if needed - set(names):
        raise ValueError(f"{path} has no column {', '.join(needed - set(names))}; it has {', '.join(names)}")
    return [name for name in names if name in needed | refused]
