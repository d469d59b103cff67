"""Libraries' tracebacks of errors that are raised again stay off stderr, and no others; Ctrl-C ends a program that is busy."""

import logging
import signal
import subprocess
import sys
import threading
import time

import pytest

from hybrid_attn import quiet

HOOKS = ((sys, "unraisablehook"), (threading, "excepthook"))


@pytest.fixture
def hooked(monkeypatch):
    """What still reaches the hooks that were there before."""
    reached, filters = [], {name: list(logging.getLogger(name).filters) for name in ("absl", "asyncio")}
    for module, hook in HOOKS:
        monkeypatch.setattr(module, hook, reached.append)
    quiet.silence_libraries()
    yield reached
    for name, before in filters.items():
        logging.getLogger(name).filters[:] = before


def raised_in(file: str, error: str) -> BaseException:
    """An error that was raised by code of that file."""
    try:
        exec(compile(f"raise {error}", file, "exec"))
    except BaseException as raised:
        return raised


@pytest.mark.parametrize("file, expected", [("/lib/orbax/checkpoint/future.py", 0), ("/run/hybrid_attn/data/rows.py", 1)])
def test_tracebacks_of_checkpoint_libraries_alone_are_silenced(hooked, caplog, file, expected):
    error = raised_in(file, "ValueError('full')")
    logging.getLogger("absl").error("a thread failed", exc_info=error)
    args = threading.ExceptHookArgs((type(error), error, error.__traceback__, None))
    threading.excepthook(args)
    assert (len(caplog.records), len(hooked)) == (expected, expected)
    logging.getLogger("absl").error("a checkpoint cannot be read")
    assert caplog.records[-1].getMessage() == "a checkpoint cannot be read"


FAILED_READS = """
import asyncio
from hybrid_attn import quiet
quiet.silence_libraries()

async def read():
    raise ValueError("damaged")

async def read_all():
    dropped = asyncio.ensure_future(read())
    await asyncio.sleep(0.1)

asyncio.run(read_all())
asyncio.get_event_loop_policy().new_event_loop().call_exception_handler({"message": "another error"})
"""


def test_asyncio_does_not_print_reads_that_failed_after_the_first_and_prints_everything_else():
    done = subprocess.run([sys.executable, "-c", FAILED_READS], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "another error\n")


@pytest.mark.parametrize(
    "file, error, expected",
    [
        ("x.py", "RuntimeError('Event loop is closed')", 0),
        ("x.py", "KeyboardInterrupt", 0),
        ("/lib/orbax/checkpoint/serialization.py", "Exception('while reading')", 0),
        ("x.py", "RuntimeError('another')", 1),
    ],
)
def test_further_failed_reads_and_ctrl_c_in_a_callback_are_not_printed_and_any_other_error_is(hooked, file, error, expected):
    class Args:
        exc_value = raised_in(file, error)
        exc_traceback = exc_value.__traceback__

    sys.unraisablehook(Args)
    assert len(hooked) == expected


ENDED = """
import atexit, os, signal
from hybrid_attn import programs
def clean_up():
    os.kill(os.getpid(), signal.SIGINT)
    sum(range(10**4))
    print("cleaned up")
def program():
    atexit.register(clean_up)  # as jax does
programs.run(program, [""])
"""


def test_ctrl_c_while_the_interpreter_shuts_down_is_ignored():
    done = subprocess.run([sys.executable, "-c", ENDED], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "cleaned up\n", "")


BUSY = """
import hashlib
from hybrid_attn import programs
programs.GRACE = 0.1
def program():
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in which Python calls no signal handler, as in a compilation
programs.run(program, [""])
"""


def test_ctrl_c_ends_a_program_whose_main_thread_is_busy_outside_python():
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as busy:
        killer = threading.Timer(60, busy.kill)
        killer.start()
        assert busy.stdout.readline() == "busy\n"
        time.sleep(0.1)
        busy.send_signal(signal.SIGINT)
        error = busy.stderr.read()
        killer.cancel()
    assert (busy.returncode, error) == (130, "error: interrupted\n")


IMPORTED = """
import signal, time
try:
    signal.raise_signal(signal.SIGINT)
    time.sleep(1)
except KeyboardInterrupt:
    print("swallowed")
"""


def test_ctrl_c_ends_a_program_that_imports_at_once(tmp_path):
    (tmp_path / "imported.py").write_text(IMPORTED)
    program = f"""
import sys
from hybrid_attn import programs
def program():
    sys.path.append({str(tmp_path)!r})
    import imported
programs.run(program, [""])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")
