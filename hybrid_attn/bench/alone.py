"""A contender in a process of its own, which starts for it, is watched, and ends."""

import contextlib
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from hybrid_attn.bench import measurement
from hybrid_attn.bench.start import POLL, started


class Request(NamedTuple):
    """The contender that the last of `functions` makes: each is (module, function, arguments), called in turn by `python`."""

    python: str
    functions: list


class Calls(NamedTuple):
    """How often a process calls its contender: `number` times, or fewer, once those after the first took `enough` seconds."""

    number: int
    enough: float = 0.0


def run_alone(request: Request, calls: Calls, limit: int) -> dict:
    """What `contender.measured` returns and when the process was started; or why that is missing, such as `limit` bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path, output = Path(folder) / "request.json", Path(folder) / "output"
        path.write_text(json.dumps({"functions": request.functions, "calls": calls.number, "enough": calls.enough}))
        begin = time.time()
        with started([request.python, "-m", "hybrid_attn.bench.contender", str(path)], folder) as process:
            fits = stays_below(limit, process)
        if fits and process.returncode == 0:
            return json.loads(path.read_text()) | {"started": begin}
        lines = output.read_text(errors="replace").strip().splitlines() or [""]
    if not fits or any(map(measurement.says_out_of_memory, lines)):
        return {"missing": measurement.does_not_fit(limit)}
    return {"missing": f"ended with {process.returncode}: {lines[-1]}"}


def stays_below(limit: int, process: subprocess.Popen) -> bool:
    """Waits for the end of a process, and returns False as soon as it has more than `limit` bytes."""
    with contextlib.suppress(psutil.NoSuchProcess):  # it ended
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            if watched.memory_info().rss > limit:
                return False
            time.sleep(POLL)
    process.wait()
    return True
