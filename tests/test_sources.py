"""Every format gives the same documents, and what cannot be read is named with its line, in its place."""

import codecs
import gzip
import json
import sys

import pytest

from hybrid_attn.data import sources, tables
from hybrid_attn.data.sources import Binary, Broken, Fields, Text

RECORDS = [
    {"text": "one\nof two lines", "meta": {"from": "a"}, "n": 1},
    {"text": "東京 🙂", "meta": {"from": "b"}, "n": 2},
    {"text": "", "meta": {"from": "a"}, "n": 3},
    {"text": None, "meta": {"from": "a"}, "n": 4},
    {"text": "\u2028last", "meta": {"from": "c"}, "n": 5},
]
WANTED = [Text((r["text"] or "").encode(), r["meta"]["from"]) for r in RECORDS]
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
    monkeypatch.setattr(tables, "BATCH", 2)
    FORMATS[name](tmp_path / name)
    assert read(tmp_path / name) == WANTED
    assert [x.label for x in read(tmp_path / name, Fields("text", "n"))] == ["1", "2", "3", "4", "5"]
    assert {x.label for x in read(tmp_path / name, Fields("text", None))} == {None}


def test_a_file_of_text_is_one_document(tmp_path):
    for name in ("a.py", "package.json", "b.txt"):
        (tmp_path / name).write_text('{"text": "東"}\n\n')
        assert read(tmp_path / name) == [Text('{"text": "東"}\n\n'.encode(), None)]
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"packed"))
    assert read(tmp_path / "c.txt.gz") == [Text(b"packed", None)]
    (tmp_path / "d.png").write_bytes(b"\x89PNG\0")
    assert read(tmp_path / "d.png") == [Binary(str(tmp_path / "d.png"))]


def test_what_is_broken_is_named_by_its_line_and_the_rest_is_read(tmp_path):
    path = tmp_path / "x.jsonl"
    broken = {
        b'{"text": "caf\xe9"}': "not UTF-8: byte 0xe9, 14 from its start",
        b'{"text": "a"': "not JSON: Expecting ',' delimiter at character 14",
        b'{"text": "\\ud800"}': "half of a surrogate pair is no character",
        b'["text"]': "there is no field 'text'; what should hold 'text' is no record",
        b'{"body": "a", "n": 1}': "there is no field 'text'; what should hold 'text' has 'body', 'n'",
        b'{"text": 3}': "the field 'text' is no text but int",
        b"[" * 100_000: "maximum recursion depth exceeded",
    }
    path.write_bytes(b"".join(b'{"text": "good"}\n\n' + line + b"\n" for line in broken))
    found = read(path, Fields("text", None))
    assert found[::2] == [Text(b"good", None)] * len(broken)
    for i, (got, reason) in enumerate(zip(found[1::2], broken.values(), strict=True)):
        assert got.reason.startswith(f"{path}, line {3 * i + 3}: {reason}"), got


def test_parts_of_a_file_of_lines_are_the_file(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines()[:90] + b"\n\n{broken}\n" + lines()[90:])
    whole, size = read(path), path.stat().st_size
    assert len([x for x in whole if isinstance(x, Broken)]) > 1
    for first in range(size + 1):
        for second in (first, min(first + 7, size)):
            edges = [(0, first), (first, second), (second, size)]
            assert [x for start, stop in edges for x in sources.read(str(path), "jsonl", FIELDS, start, stop)] == whole
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


def test_a_table_altered_within_is_named_and_what_the_system_reports_is_raised(tmp_path):
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


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst"])
@pytest.mark.parametrize("cut", [1, 3, 9, 60])
def test_a_packed_file_cut_short_gives_what_it_has_and_is_named(tmp_path, name, cut):
    FORMATS[name](tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-cut])
    *documents, last = read(tmp_path / name)
    assert documents == WANTED[: len(documents)]
    assert last.reason.startswith(f"{tmp_path}/{name}: its packing is broken: ")


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst"])
def test_a_packed_file_that_is_none_is_named(tmp_path, name):
    if name.endswith("zst"):
        pytest.importorskip("zstandard")
    (tmp_path / name).write_bytes(b"this is not packed at all")
    assert [x.reason.startswith(f"{tmp_path}/{name}: its packing is broken: ") for x in read(tmp_path / name)] == [True]


def test_files_are_found_once_in_the_order_of_their_names(tmp_path):
    for name in ("b/1.py", "a/2.py", "a/.git/config", "a/__pycache__/2.pyc", ".hidden/3.py", "c.txt"):
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
    with pytest.raises(ValueError, match="empty has no files under it"):
        sources.find([str(tmp_path / "empty")])


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
    with pytest.raises(ValueError, match="keeps an order of rows beside its rows; save it again after flatten_indices"):
        sources.find([str(data)])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=f"holds several datasets; name those you want: {tmp_path}/train, {tmp_path}/test"):
        sources.find([str(tmp_path)])


@pytest.mark.parametrize(("name", "library"), [("x.jsonl.zst", "zstandard"), ("x.parquet", "pyarrow"), ("x.arrow", "pyarrow")])
def test_a_missing_library_names_its_extra(tmp_path, monkeypatch, name, library):
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / name).touch()
    with pytest.raises(ImportError, match=rf"{name} needs the library {library}; pip install 'hybrid_attn\[data\]'"):
        read(tmp_path / name)
