"""A store that was interrupted, failed or damaged is continued, and other options or files are refused."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from prepared import ROOT, content, run, texts, write

from hybrid_attn import files
from hybrid_attn.data import parts, prepare, store
from hybrid_attn.data.sources import Fields


def test_a_run_that_failed_goes_on_without_doing_shards_again(tmp_path, monkeypatch):
    write(tmp_path / "raw")
    run(tmp_path, "straight")
    encode, seen = parts.encode, []

    def fail_once(folder, index, paths, options):
        seen.append(index)
        if len(seen) == 3:
            raise OSError("no space left")
        encode(folder, index, paths, options)

    monkeypatch.setattr(parts, "encode", fail_once)
    with pytest.raises(OSError, match="no space left; 2 of [0-9]+ shards are done and kept; solve the problem, then the same"):
        run(tmp_path)
    with pytest.raises(ValueError, match="is not finished; the same command of tools/prepare_data.py continues it"):
        store.load(str(tmp_path / "out"))
    _, lines = run(tmp_path)
    assert lines[0].startswith("2 of ") and len(seen) == len(set(seen)) + 1 and seen.count(2) == 2
    assert content(tmp_path / "out") == content(tmp_path / "straight")
    assert run(tmp_path)[1] == [f"{tmp_path}/out is complete"]


def test_a_run_that_failed_before_its_first_shard_goes_on(tmp_path, monkeypatch):
    write(tmp_path / "raw")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path)
    for name in ("plan.json.partial1", ".plan.json.partial1"):  # as a kill leaves it, of an older version and of this one
        (tmp_path / "out" / name).write_bytes(b"half")
    run(tmp_path)
    assert not list((tmp_path / "out").glob("*.partial*"))
    with monkeypatch.context() as patch:
        patch.setattr(parts, "write", raise_full)
        with pytest.raises(OSError, match="no space left; 0 of .* shards are done and kept"):
            run(tmp_path, "other")


def raise_full(*_):
    raise OSError("no space left")


def test_a_store_is_written_by_one_process_at_a_time(tmp_path):
    write(tmp_path / "raw")
    with files.lock(tmp_path / "out"):
        with pytest.raises(BlockingIOError, match="out is in use by process [0-9]+ .*; wait until that ends"):
            run(tmp_path)
        assert [x.name for x in (tmp_path / "out").iterdir()] == [files.LOCK]
    run(tmp_path)
    run(tmp_path, "straight")
    assert content(tmp_path / "out") == content(tmp_path / "straight") and files.LOCK not in content(tmp_path / "out")
    with files.lock(tmp_path / "straight"):
        assert run(tmp_path, "straight")[1] == [f"{tmp_path}/straight is complete"]  # which needs no lock, nor to write


def unfinished(tmp_path, monkeypatch):
    """A store of which all parts are done and no shard is written."""
    write(tmp_path / "raw")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_write_shard", raise_full)
        with pytest.raises(OSError, match="no space left"):
            run(tmp_path)
    return tmp_path / "out"


@pytest.mark.parametrize("damage", [
    lambda x: b"", lambda x: b"[]", lambda x: b"null", lambda x: b"[" * 10**5, lambda x: b"\xff", lambda x: x[:-9],
    lambda x: x.replace(b'"options"', b'"option"'), lambda x: x.replace(b'"on_error"', b'"on_eror"'),
    lambda x: x.replace(b'"path"', b'"pth"'), lambda x: x.replace(b'"shards"', b'"shard"'),
])  # fmt: skip
def test_a_damaged_plan_is_refused(tmp_path, monkeypatch, damage):
    plan = unfinished(tmp_path, monkeypatch) / store.PLAN
    plan.write_bytes(damage(plan.read_bytes()))
    with pytest.raises(ValueError, match="out/plan.json .*; name another --out"):
        run(tmp_path)


@pytest.mark.parametrize(("name", "damage"), [
    ("shard-00001.tokens", lambda x: x[:-2]), ("shard-00001.npz", lambda x: x[: len(x) // 2]),
    ("shard-00001.npz", lambda x: x.replace(b"lengths.npy", b"lenghts.npy")), ("shard-00001.npz", lambda x: b""),
    ("shard-00001.json", lambda x: b"[]"), ("shard-00001.json", lambda x: b""),
    ("shard-00001.json", lambda x: x.replace(b'"labels": [', b'"labels": [3, ')),
    ("shard-00001.json", lambda x: x.replace(b'"labels": [', b'"labels": [], "label": [')),
])  # fmt: skip
def test_a_damaged_part_is_named_and_made_again(tmp_path, monkeypatch, name, damage):
    part = unfinished(tmp_path, monkeypatch) / "parts" / name
    part.write_bytes(damage(part.read_bytes()))
    cure = "out/parts/shard-00001.json, and the same command makes the part again"
    with pytest.raises(ValueError, match=f"the part .*out/parts/shard-00001 is damaged: .*; delete .*{cure}"):
        run(tmp_path)
    part.with_suffix(".json").unlink()
    run(tmp_path)
    run(tmp_path, "straight")
    assert content(tmp_path / "out") == content(tmp_path / "straight")


def test_a_document_that_is_too_long_is_read_once_it_may_be(tmp_path):
    made = [x["text"] for x in write(tmp_path / "raw") if x["text"]]
    with open(tmp_path / "raw/5.jsonl", "a") as file:
        file.write(json.dumps({"text": "y" * 2000, "source": "a"}) + "\n")
    with pytest.raises(
        ValueError, match="5.jsonl, line 16: it has more than the 1,000 bytes .*, which --max_document_mb raises; continue with"
    ):
        run(tmp_path, document_bytes=1000)
    run(tmp_path, document_bytes=3000)
    assert texts(tmp_path / "out") == [*made, "y" * 2000]
    assert run(tmp_path, "skipped", on_error="skip", document_bytes=1000)[0]["skipped"]["broken"] == 1
    with pytest.raises(ValueError, match="was begun with document_bytes=1000, and now it is 3000"):
        run(tmp_path, "skipped", on_error="skip", document_bytes=3000)


def test_a_store_of_a_version_without_a_bound_of_documents_goes_on(tmp_path, monkeypatch):
    plan = unfinished(tmp_path, monkeypatch) / store.PLAN
    old = json.loads(plan.read_text())
    del old["options"]["document_bytes"]
    plan.write_text(json.dumps(old))
    assert run(tmp_path)[1][0].endswith(" shards are done already")


def test_a_run_that_failed_while_dropping_duplicates_goes_on(tmp_path, monkeypatch):
    write(tmp_path / "raw")
    run(tmp_path, "straight", drop_duplicates=True)
    with monkeypatch.context() as patch:
        index_bytes = store.index_bytes
        calls = iter([False, False, True] + [False] * 99)
        patch.setattr(store, "index_bytes", lambda *x: 1 // 0 if next(calls) else index_bytes(*x))
        with pytest.raises(ZeroDivisionError):
            run(tmp_path, drop_duplicates=True)
    run(tmp_path, drop_duplicates=True)
    assert content(tmp_path / "out") == content(tmp_path / "straight")


def command(tmp_path, *flags):
    return [
        sys.executable, ROOT / "tools/prepare_data.py", f"--input={tmp_path}/raw", f"--out={tmp_path}/out",
        "--label_field=source", "--workers=2", "--shard_mb=1", *flags,
    ]  # fmt: skip


def test_a_killed_run_goes_on_and_leaves_no_process_behind(tmp_path):
    write(tmp_path / "raw", files=1, each=10)
    lines = (tmp_path / "raw/0.jsonl").read_text() * 1000
    for i in range(16):
        (tmp_path / f"raw/{i}.jsonl").write_text(lines)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command(tmp_path), env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as killed:
        deadline = time.monotonic() + 60
        while not (done := list((tmp_path / "out").glob("parts/*.json"))) and time.monotonic() < deadline:
            time.sleep(0.002)
        killed.send_signal(signal.SIGKILL)
        killed.communicate(timeout=30)  # the workers hold the pipe too, so it ends when they do
    assert done and killed.wait() == -signal.SIGKILL and not (tmp_path / "out" / store.MANIFEST).exists()
    (tmp_path / "out/parts/.shard-00015.tokens.partial1").write_bytes(b"half")
    again = subprocess.run(command(tmp_path), env=environment, capture_output=True, text=True, check=True)
    assert " shards are done already" in again.stdout and "documents    " in again.stdout
    run(tmp_path, "straight", inputs="raw", shard_bytes=10**6, label="text")
    assert content(tmp_path / "out") == content(tmp_path / "straight")


def test_a_full_disk_is_an_error_of_one_line_and_finished_shards_stay(tmp_path):
    write(tmp_path / "raw", files=2)
    (tmp_path / "raw/1.jsonl").write_text(json.dumps({"text": "x" * 1_200_000, "source": "a"}) + "\n")
    (tmp_path / "raw/2.jsonl").write_text(json.dumps({"text": "y", "source": "a"}) + "\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    limited = ["bash", "-c", 'ulimit -f 1000; exec "$@"', "bash", *command(tmp_path, "--workers=1")]
    failed = subprocess.run(limited, env=environment, capture_output=True, text=True)
    assert failed.returncode == 1 and not list(tmp_path.glob("out/parts/*.partial*"))
    assert "error: [Errno 27] File too large; 0 of 2 shards are done and kept; solve the problem, then the" in failed.stderr
    assert "Traceback" not in failed.stderr
    subprocess.run(command(tmp_path, "--workers=1"), env=environment, capture_output=True, check=True)
    assert texts(tmp_path / "out")[-2:] == ["x" * 1_200_000, "y"]


def test_broken_lines_stop_or_are_skipped_and_counted(tmp_path):
    made = [x["text"] for x in write(tmp_path / "raw") if x["text"]]
    path = tmp_path / "raw/0.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n' + path.read_bytes() + b"{\n")
    with pytest.raises(
        ValueError, match=r"0.jsonl, line 1: not UTF-8: byte 0xff.*; continue with --on_error=skip, or repair it and"
    ):
        run(tmp_path)
    assert run(tmp_path, on_error="skip")[0]["skipped"]["broken"] == 2
    with pytest.raises(ValueError, match="was begun with on_error='skip', and now it is 'stop'"):
        run(tmp_path)
    summary, lines = run(tmp_path, "skipped", on_error="skip")
    assert summary["skipped"]["broken"] == 2 and texts(tmp_path / "skipped") == made
    assert [line.split(": ")[0] for line in lines] == [f"skipped      {path}, line {n}" for n in (1, 17)]


@pytest.mark.parametrize(("change", "message"), [
    ({"drop_duplicates": True}, "was begun with drop_duplicates=False, and now it is True; use what it was begun with"),
    ({"shard_bytes": 1}, "was begun with shard_bytes=900, and now it is 1"),
    ({"fields": Fields("text", None)}, "was begun with fields={'text': 'text', 'label': 'source'}, and now it is"),
])  # fmt: skip
def test_other_options_on_resume_are_refused(tmp_path, change, message):
    write(tmp_path / "raw")
    run(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **change)


def test_other_files_on_resume_are_refused(tmp_path):
    write(tmp_path / "raw")
    run(tmp_path)
    os.utime(tmp_path / "raw/3.jsonl", (1, 1))
    with pytest.raises(ValueError, match=r"input files changed since .*/out was begun \(1 of them, first .*/3.jsonl\); use"):
        run(tmp_path)
    (tmp_path / "raw/9.jsonl").touch()
    with pytest.raises(ValueError, match=r"\(2 of them, first .*/3.jsonl\)"):
        run(tmp_path)
    with pytest.raises(ValueError, match="raw is not empty and has no unfinished store; name another --out"):
        run(tmp_path, "raw")
