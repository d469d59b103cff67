"""A file is written completely or not at all, and a directory is held by one process at a time."""

import os
import signal
import subprocess
import sys
import time

import pytest

from hybrid_attn.files import LOCK, lock, write_atomically

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
    assert path.read_text() == "old"
    write_atomically(path, "half \ud800 a pair")
    assert path.read_text() == "half ? a pair"
