"""A file is written completely or not at all, and a directory is held by one process at a time."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from hybrid_attn import files
from hybrid_attn.files import LOCK, Appended, lock, set_aside, write_atomically

HOLD = """
import pathlib, sys, time
from hybrid_attn.files import lock
with lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(directory) -> subprocess.Popen:
    """Another process that holds the directory."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(directory)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_directory_that_another_process_holds_is_refused_with_its_name_and_taken_over_once_it_is_killed(tmp_path):
    directory = tmp_path / "new" / "run"
    with hold(directory) as other:
        began = time.monotonic()
        with pytest.raises(BlockingIOError, match=f"run is in use by process {other.pid} on .* since .*: -c {directory}"):
            with lock(directory):
                pass
        assert time.monotonic() - began < 5
        other.send_signal(signal.SIGKILL)
        other.wait()
        with lock(directory):
            assert f"process {os.getpid()} " in (directory / LOCK).read_text()
    assert (directory / LOCK).read_text() == ""


def test_a_lock_is_released_by_an_error_within_it(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), lock(tmp_path):
            raise ZeroDivisionError


def test_a_file_that_cannot_be_written_keeps_its_old_content(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_atomically(path, "old")
    with pytest.raises(AttributeError):
        write_atomically(path, None)
    assert path.read_text() == "old" and os.listdir(path.parent) == ["b.json"]
    write_atomically(path, "half \ud800 a pair")
    assert path.read_text() == "half ? a pair"


def test_no_link_is_followed_and_no_file_of_a_like_name_is_lost(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "out" / "report.html"
    victim.write_text("of somebody")
    path.parent.mkdir()
    for name in ("report.html.part", ".report.html.part", "report.html", LOCK):
        (path.parent / name).symlink_to(victim)
    write_atomically(path, "new")
    with pytest.raises(ValueError, match="out/.lock is a link, and this program makes none; remove it"), lock(path.parent):
        pass
    assert victim.read_text() == "of somebody" and path.read_text() == "new" and not path.is_symlink()
    assert sorted(x.name for x in path.parent.iterdir()) == [LOCK, "report.html", "report.html.part"]


def test_a_disk_without_locks_is_used_with_a_warning_and_any_other_error_is_one(tmp_path, monkeypatch, caplog):
    def refuse(number):
        def flock(*_):
            raise OSError(number, os.strerror(number))

        return flock

    monkeypatch.setattr(files.fcntl, "flock", refuse(errno.ENOLCK))
    with lock(tmp_path):
        assert f"{tmp_path} is on a disk without locks" in caplog.text
    monkeypatch.setattr(files.fcntl, "flock", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"), lock(tmp_path):
        pass


def test_a_renamed_old_file_gets_the_first_free_name(tmp_path):
    for _ in range(3):
        (tmp_path / "a.txt").write_text("")
        set_aside(tmp_path / "a.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt.old", "a.txt.old1", "a.txt.old2"]


def test_a_file_that_is_removed_or_replaced_while_it_grows_is_written_again(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"1\n")
    file = Appended(path)
    assert not file.write(b"2\n")
    path.unlink()
    assert file.write(b"3\n") and not file.write(b"4\n")
    assert path.read_bytes() == b"1\n2\n3\n4\n"
    write_atomically(path, "of somebody else")
    assert file.write(b"5\n")
    file.close()
    assert path.read_bytes() == b"1\n2\n3\n4\n5\n"
    assert (tmp_path / "lines.old").read_text() == "of somebody else"


def test_bytes_that_a_full_disk_refused_are_written_completely_once_there_is_space(tmp_path):
    path, (soft, hard) = tmp_path / "lines", resource.getrlimit(resource.RLIMIT_FSIZE)
    file = Appended(path)
    file.write(b"1\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, hard))  # in the middle of the next line
    try:
        for line in (b"234\n", b"5\n"):
            with pytest.raises(OSError, match="lines") as error:
                file.write(line)
            assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(path))
        assert path.read_bytes() == b"1\n"
        with pytest.raises(OSError, match="whole"):
            write_atomically(tmp_path / "whole", "234\n567")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    file.write(b"6\n")
    assert path.read_bytes() == b"1\n234\n5\n6\n"
