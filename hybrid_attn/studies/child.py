"""The process between a study and a run: python child.py STUDY COST STARTED COMMAND... runs COMMAND and writes what it cost.

STUDY is the number of the study's process. Two lines are appended to the file COST: STARTED, an object with the time of the
start, and at the end of the command the same time with CPU seconds, seconds and exit code. The command gets one SIGTERM, when
this process gets one or when the study has ended, however it did. Only the standard library is imported: a start is fast.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

POLL = 0.05  # seconds


def main(study: str, cost: str, started: str, *command: str) -> int:
    """The exit code of the command; 128 + N where the signal N ended it."""
    stops: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stops.append(number))
    with open(cost, "a", buffering=1) as file:
        with contextlib.suppress(OSError):  # of a disk without locks
            fcntl.flock(file, fcntl.LOCK_EX)  # the run of a study that was killed may still save its checkpoint
        file.write(f"{started}\n")
        began = time.monotonic()
        process = subprocess.Popen(command)
        status, usage = wait(process, lambda: bool(stops) or os.getppid() != int(study))
        code = os.waitstatus_to_exitcode(status)
        spent = {"cpu_seconds": usage.ru_utime + usage.ru_stime, "seconds": time.monotonic() - began, "exit_code": code}
        file.write(json.dumps({"started": json.loads(started)["started"]} | spent) + "\n")
    return code if code >= 0 else 128 - code


def wait(process: subprocess.Popen, is_stopped: Callable[[], bool]):
    """The status and the resource usage of a process at its end."""
    is_told = False
    while True:
        number, status, usage = os.wait4(process.pid, os.WNOHANG)
        if number:
            return status, usage
        if is_stopped() and not is_told:
            os.kill(process.pid, signal.SIGTERM)  # once: a second one would end it without a checkpoint
            is_told = True
        time.sleep(POLL)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
