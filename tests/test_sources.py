"""Every format gives the same documents, and a broken record is named with its line, in order."""

import codecs
import gzip
import itertools
import json
import os
import sys
import tracemalloc

import pytest

from hybrid_attn.data import records, sources
from hybrid_attn.data.sources import Binary, Broken, Fields, Text

RECORDS = [
    {"text": "one\nof two lines", "meta": {"from": "a"}, "n": 1},
    {"text": "東京 🙂", "meta": {"from": "b"}, "n": 2},
    {"text": "", "meta": {"from": "a"}, "n": 3},
    {"text": None, "meta": {"from": "a"}, "n": 4},
    {"text": "\u2028last", "meta": {"from": "c"}, "n": 5},
]
EXPECTED = [Text((r["text"] or "").encode(), r["meta"]["from"]) for r in RECORDS]
FIELDS = Fields("text", "meta.from")


def lines(records=RECORDS):
    return "".join(json.dumps(r, ensure_ascii=i % 2 == 0) + "\n" for i, r in enumerate(records)).encode()


def read(path, fields=FIELDS):
    return list(sources.read(str(path), sources.format_of(str(path)), fields))


def write_plain(path):
    path.write_bytes(lines())


def write_gz(path):
    path.write_bytes(gzip.compress(lines()[:50]) + gzip.compress(lines()[50:]))


def write_zst(path):
    compress = pytest.importorskip("zstandard").ZstdCompressor().compress
    path.write_bytes(compress(lines()[:50]) + compress(lines()[50:]))


def write_parquet(path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path, row_group_size=2)


def write_arrow(path):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(RECORDS)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


FORMATS = {
    "x.jsonl": write_plain, "x.ndjson": write_plain, "x.jsonl.gz": write_gz, "x.json.gz": write_gz,
    "x.jsonl.zst": write_zst, "x.parquet": write_parquet, "x.arrow": write_arrow,
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_of_records_gives_the_same_documents(tmp_path, name, monkeypatch):
    monkeypatch.setattr(records, "BATCH", 2)
    FORMATS[name](tmp_path / name)
    assert read(tmp_path / name) == EXPECTED
    assert [x.label for x in read(tmp_path / name, Fields("text", "n"))] == ["1", "2", "3", "4", "5"]
    assert {x.label for x in read(tmp_path / name, Fields("text", None))} == {None}


def test_a_file_of_text_is_one_document(tmp_path):
    for name in ("a.py", "package.json", "b.txt"):
        (tmp_path / name).write_text('{"text": "東"}\n\n')
        assert read(tmp_path / name) == [Text('{"text": "東"}\n\n'.encode(), None)]
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"packed"))
    assert read(tmp_path / "c.txt.gz") == [Text(b"packed", None)]
    (tmp_path / "d.png").write_bytes(b"\x89PNG\0")
    assert read(tmp_path / "d.png") == [Binary(f"{tmp_path}/d.png: binary or UTF-16, not UTF-8 text")]


def test_a_broken_record_is_named_by_its_line_and_the_others_are_read(tmp_path):
    path = tmp_path / "x.jsonl"
    broken = {
        b'{"text": "caf\xe9"}': "not UTF-8: byte 0xe9, 14 from its start",
        b'{"text": "a"': "not JSON: Expecting ',' delimiter at character 14",
        b'{"text": "\\ud800"}': "it has half of a surrogate pair, which is not a character",
        b'["text"]': "there is no field 'text': the record that should hold 'text' is not a record",
        b'{"body": "a", "n": 1}': "there is no field 'text': the record that should hold 'text' has 'body', 'n'",
        b'{"text": 3}': "the field 'text' is of type int, not text",
        b"[" * 100_000: "maximum recursion depth exceeded",
    }
    path.write_bytes(b"".join(b'{"text": "good"}\n\n' + line + b"\n" for line in broken))
    results = read(path, Fields("text", None))
    assert results[::2] == [Text(b"good", None)] * len(broken)
    for i, (got, reason) in enumerate(zip(results[1::2], broken.values(), strict=True)):
        assert got.reason.startswith(f"{path}, line {3 * i + 3}: {reason}"), got


def test_parts_of_a_file_of_lines_are_the_file(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines()[:90] + b"\n\n{broken}\n" + lines()[90:])
    documents, size = read(path), path.stat().st_size
    assert len([x for x in documents if isinstance(x, Broken)]) > 1
    for first in range(size + 1):
        for second in (first, min(first + 7, size)):
            edges = [(0, first), (first, second), (second, size)]
            assert [x for start, stop in edges for x in sources.read(str(path), "jsonl", FIELDS, start, stop)] == documents
    assert sources.splits("a.jsonl", "jsonl") and sources.splits("a.json", "jsonl")
    assert not sources.splits("a.jsonl.gz", "jsonl") and not sources.splits("a.jsonl", "text")


def test_text_that_is_not_utf8_is_named_by_its_line(tmp_path):
    (tmp_path / "x.txt").write_bytes("東\n".encode() + b"b\nc\xff")
    assert read(tmp_path / "x.txt") == [Broken(f"{tmp_path}/x.txt, line 3: not UTF-8: byte 0xff, 8 from its start")]


def test_rows_of_a_table_that_are_not_utf8_are_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = pyarrow.array([b"a", b"b\xff", b"c"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet", Fields("text", None)) == [
        Text(b"a", None), Broken(f"{tmp_path}/x.parquet, row 2: not UTF-8: byte 0xff, 2 from its start"), Text(b"c", None)
    ]  # fmt: skip
    with pytest.raises(ValueError, match="x.parquet has no column body; it has text"):
        read(tmp_path / "x.parquet", Fields("body", None))
    for name in ("y.parquet", "y.arrow"):
        (tmp_path / name).write_bytes(b"PAR1 cut short")
        assert [type(x) for x in read(tmp_path / name)] == [Broken]


def test_a_damaged_table_is_named_and_errors_of_the_system_are_raised(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": [f"{i} of many" for i in range(5000)]})
    parquet.write_table(table, tmp_path / "x.parquet", compression="snappy", use_dictionary=False)
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    content[1000:3000] = b"\xff" * 2000
    (tmp_path / "x.parquet").write_bytes(content)
    *_, last = read(tmp_path / "x.parquet", Fields("text", None))
    assert isinstance(last, Broken) and last.reason.startswith(f"{tmp_path}/x.parquet: not Parquet: ")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.parquet", Fields("text", None))


def test_a_byte_order_mark_before_the_first_record_is_no_part_of_it(tmp_path):
    record = json.dumps({"text": "a"}).encode()
    (tmp_path / "x.jsonl").write_bytes(codecs.BOM_UTF8 + record + b"\n" + codecs.BOM_UTF8 + record + b"\n")
    first, second = read(tmp_path / "x.jsonl", Fields("text", None))
    assert first == Text(b"a", None) and second.reason.startswith(f"{tmp_path}/x.jsonl, line 2: not ")


def test_every_type_of_frame_of_a_zst_file_is_read(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    content = b"".join(b"%d\n" % (i * i % 99_991) for i in range(60_000))  # several blocks
    skipped = b"\x5a\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"\xffdata"
    stream = zstandard.ZstdCompressor(level=1, write_checksum=True).compressobj()  # of a length that its header does not tell
    streamed = stream.compress(content) + stream.flush()
    small = zstandard.ZstdCompressor(write_content_size=True).compress(b"small")
    (tmp_path / "x.txt.zst").write_bytes(skipped + streamed + small + skipped + zstandard.ZstdCompressor().compress(content))
    assert read(tmp_path / "x.txt.zst") == [Text(content + b"small" + content, None)]
    for damaged in (streamed[:-1] + bytes([streamed[-1] ^ 1]), skipped[:-1], skipped[:8], skipped[:7]):
        for before in (b"", small):
            (tmp_path / "x.txt.zst").write_bytes(before + damaged)
            (results,) = read(tmp_path / "x.txt.zst")
            assert results.reason.startswith(f"{tmp_path}/x.txt.zst: its compression is damaged: ")


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst"])
@pytest.mark.parametrize("cut", [1, 3, 9, 60])
def test_the_records_of_a_truncated_compressed_file_are_read_and_the_file_is_named(tmp_path, name, cut):
    FORMATS[name](tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-cut])
    *documents, last = read(tmp_path / name)
    assert documents == EXPECTED[: len(documents)]
    assert last.reason.startswith(f"{tmp_path}/{name}: its compression is damaged: ")


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst"])
def test_a_file_that_is_not_compressed_as_its_name_says_is_named(tmp_path, name):
    if name.endswith("zst"):
        pytest.importorskip("zstandard")
    (tmp_path / name).write_bytes(b"this is not packed at all")
    assert [x.reason.startswith(f"{tmp_path}/{name}: its compression is damaged: ") for x in read(tmp_path / name)] == [True]


def test_each_file_is_listed_once_in_the_order_of_the_names(tmp_path):
    for name in ("b/1.py", "a/2.py", "a/.git/config", "a/__pycache__/2.pyc", ".hidden/3.py", "c.txt", ".env", "b/.netrc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "b/link.py").symlink_to(tmp_path / "a/2.py")
    relative = [path.removeprefix(f"{tmp_path}/") for path in sources.find([str(tmp_path)])]
    assert relative == ["a/2.py", "b/1.py", "c.txt"]
    again = sources.find([str(tmp_path / "b/*.py"), str(tmp_path)])
    assert [path.removeprefix(f"{tmp_path}/") for path in again] == ["b/1.py", "b/link.py", "c.txt"]
    with pytest.raises(ValueError, match="matches no file"):
        sources.find([str(tmp_path / "*.none")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no files that are not hidden"):
        sources.find([str(tmp_path / "empty")])


def bomb(path, num_bytes, begin=b""):
    """A file of `begin` and very many letters a: a .zst of blocks of 4 bytes for 128 KiB each, or a .gz."""
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(begin) + gzip.compress(b"a" * num_bytes, 1))
        return
    block, first = 2**17, len(begin) << 3
    blocks = b"".join((last | 1 << 1 | block << 3).to_bytes(3, "little") + b"a" for last in [0] * (num_bytes // block) + [1])
    path.write_bytes(b"\x28\xb5\x2f\xfd\x00\x58" + first.to_bytes(3, "little") + begin + blocks)  # a window of 2 MiB


@pytest.mark.parametrize("name", ["x.jsonl.zst", "x.txt.zst", "x.jsonl.gz"])
def test_memory_does_not_grow_with_the_size_that_a_compressed_file_declares(tmp_path, name):
    if name.endswith("zst"):
        pytest.importorskip("zstandard")
    bomb(tmp_path / name, 10**9 if name.endswith("zst") else 10**8, b'{"text": "')
    assert (tmp_path / name).stat().st_size < 500_000
    tracemalloc.start()
    results = list(itertools.islice(sources.read(str(tmp_path / name), None, Fields("text", None), max_bytes=10**6), 1))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (
        peak < 2 * 10**7
        and isinstance(results[0], Broken)
        and "more than the 1,000,000 bytes that a document may have" in results[0].reason
    )


def test_a_line_that_is_too_long_is_named_and_the_others_are_read(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "1"}\n{"text": "' + b"2" * 3000 + b'"}\n{"text": "3"}\n{"text": "' + b"4" * 3000)

    def read_part(start, stop):
        return list(sources.read(str(path), "jsonl", Fields("text", None), start, stop, max_bytes=100))

    size = path.stat().st_size
    results = read_part(0, size)
    assert results[::2] == [Text(b"1", None), Text(b"3", None)]
    reason = "it has more than the 100 bytes that a document may have"
    assert [x.reason for x in results[1::2]] == [f"{path}, line {n}: {reason}" for n in (2, 4)]
    for cut in (*range(0, 40), *range(2990, 3080), size - 1, size):
        assert read_part(0, cut) + read_part(cut, size) == results


def test_a_row_of_a_table_that_is_too_long_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", "b" * 200, "c"]}), tmp_path / "x.parquet")
    results = list(sources.read(str(tmp_path / "x.parquet"), None, Fields("text", None), max_bytes=150))
    assert [type(x) for x in results] == [Text, Broken, Text]
    assert (
        results[1].reason == f"{tmp_path}/x.parquet, row 2: it has 200 bytes, more than the 150 bytes that a document may have"
    )
    (long,) = sources.read(str(tmp_path / "x.parquet"), None, Fields("text", None), max_bytes=20)
    assert " bytes on average, more than the 20 bytes that a document may have" in long.reason


def test_a_batch_that_refers_to_memory_that_is_not_its_own_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    offsets = pyarrow.py_buffer(b"".join(x.to_bytes(4, "little") for x in (0, 1, 2**30, 2)))
    texts = pyarrow.StringArray.from_buffers(3, offsets, pyarrow.py_buffer(b"ab"))
    batch = pyarrow.RecordBatch.from_arrays([texts], ["text"])
    with pyarrow.OSFile(str(tmp_path / "x.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, batch.schema) as writer:
        writer.write_batch(batch)
    (results,) = read(tmp_path / "x.arrow", Fields("text", None))
    assert results.reason.startswith(f"{tmp_path}/x.arrow: not a stream of Arrow batches: ")


@pytest.mark.parametrize("content", [
    lines(), lines() * 2, b'[{"text": "a"}, {"text": "b"}]', b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}', b'{"a": 1} {"a": 2}',
])  # fmt: skip
def test_a_json_file_of_records_is_a_document_only_with_the_format_text(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    (results,) = sources.read(str(path), None, FIELDS)
    assert results.reason.startswith(f"{path}: it holds JSON records") and "--format=jsonl" in results.reason
    assert list(sources.read(str(path), "text", FIELDS)) == [Text(content, None)]
    assert list(sources.read(str(path), "jsonl", FIELDS)) != results


@pytest.mark.parametrize(
    "content", [b'{"text": "a",\n "b": [1]}\n', b"[1, 2]", b'[{"a": 1}]', b"[[" * 10_000, b"{", b"// a\n{}"]
)
def test_other_json_files_are_documents(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    assert list(sources.read(str(tmp_path / "x.json"), None, FIELDS)) == [Text(content, None)]


def test_files_of_other_formats_are_binary_whatever_their_name(tmp_path):
    begins = [gzip.compress(b"a"), b"BZh91AY&SY", b"\xfd7zXZ", b"PK\x03\x04", b"PAR1", b"%PDF-1.7", "東".encode("utf-16")]
    for content in (*begins, "a".encode("utf-16-le")):
        (tmp_path / "x.txt").write_bytes(content)
        assert read(tmp_path / "x.txt") == [Binary(f"{tmp_path}/x.txt: binary or UTF-16, not UTF-8 text")], content
    (tmp_path / "x.txt").write_bytes("BZh and PK: 東".encode())
    assert read(tmp_path / "x.txt") == [Text("BZh and PK: 東".encode(), None)]


def test_a_pipe_in_a_directory_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "a.txt").write_text("a")
    assert sources.find([str(tmp_path)]) == [str(tmp_path / "a.txt")]


@pytest.mark.parametrize("name", [
    "../../../../etc/passwd", "/etc/passwd", "../train/a.arrow", "sub/a.arrow", "notes.txt", "..", "", None, 3, ["a.arrow"],
])  # fmt: skip
def test_a_dataset_reads_only_tables_of_its_own_folder(tmp_path, name):
    for file in ("dataset_info.json", "notes.txt"):
        (tmp_path / file).write_text("{}")
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(ValueError, match=f"{tmp_path}/state.json was not written by the library datasets: "):
        sources.find([str(tmp_path)])


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "{}", '{"_data_files": []}', '{"_data_files": 1}', "[" * 10**5, "\udc80"]
)
def test_a_dataset_that_is_described_wrongly_is_refused(tmp_path, content):
    (tmp_path / "dataset_info.json").touch()
    (tmp_path / "state.json").write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match="state.json was not written by the library datasets: "):
        sources.find([str(tmp_path)])
    (tmp_path / "dataset_dict.json").write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match="dataset_dict.json was not written by the library datasets: "):
        sources.find([str(tmp_path)])


def test_a_dataset_on_disk_is_the_files_that_it_lists(tmp_path):
    data = tmp_path / "train"
    data.mkdir()
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name in (*names, "cache-1.arrow", "dataset_info.json"):
        (data / name).write_text("{}")
    state = {"_data_files": [{"filename": name} for name in names]}
    (data / "state.json").write_text(json.dumps(state))
    assert sources.find([str(data)]) == [str(data / name) for name in names]
    (data / "state.json").write_text(json.dumps(state | {"_indices_data_files": [{"filename": "i.arrow"}]}))
    with pytest.raises(ValueError, match="stores an order of its rows in a file of indices; save it again after flatten"):
        sources.find([str(data)])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=f"holds several datasets; name some of them: {tmp_path}/train, {tmp_path}/test"):
        sources.find([str(tmp_path)])


@pytest.mark.parametrize(("name", "library"), [("x.jsonl.zst", "pyarrow"), ("x.parquet", "pyarrow"), ("x.arrow", "pyarrow")])
def test_a_missing_library_names_its_extra(tmp_path, monkeypatch, name, library):
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / name).touch()
    with pytest.raises(ImportError, match=rf"{name} needs the library {library}; pip install 'hybrid_attn\[data\]'"):
        read(tmp_path / name)
