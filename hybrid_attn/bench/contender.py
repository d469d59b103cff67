"""A contender of the benchmark: what it returns, and how it runs alone: python -m hybrid_attn.bench.contender REQUEST.

It imports the standard library only, because the Python environments of other libraries run it too, and because what a
contender does not need would count in its memory and in the time of its start.
"""

import importlib
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

STATUS = Path("/proc/self/status")
LIBRARIES = ("jax", "torch", "transformers", "maxtext")


class Ready(NamedTuple):
    """`run` does the work once and waits for its end; `memory` is its memory in bytes, or None to measure the process.

    `parameters` is the number of parameters of the model and `kernel` the name of its attention, where there is one.
    """

    run: Callable[[], Any]
    memory: int | None
    parameters: int | None = None
    kernel: str | None = None


class Answer(NamedTuple):
    """Seconds of the prefill, seconds of each decoded token, the tokens, and the bytes of the cache if known."""

    prefill: float
    token: float
    tokens: list[int]
    cache_bytes: int | None


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = STATUS.read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def measured(ready: Ready, calls: int, enough: float) -> dict:
    """Seconds and results of the calls, when the first began and ended, the highest memory of the process, its versions.

    There are `calls` of them, or fewer: none follows once those after the first have taken `enough` seconds.
    """
    began, ended, seconds, results = time.time(), None, [], []
    while len(seconds) < calls and (len(seconds) < 2 or sum(seconds[1:]) < enough):
        begin = time.perf_counter()
        results.append(ready.run())
        seconds.append(time.perf_counter() - begin)
        ended = ended or time.time()
    memory = status("VmHWM") if STATUS.exists() else None
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES if name in sys.modules}
    about = {"parameters": ready.parameters, "kernel": ready.kernel, "memory": memory, "seconds": seconds, "results": results}
    return {"began": began, "ended": ended} | about | {"versions": versions | {"python": platform.python_version()}}


def main(path: Path) -> None:
    """Does what the JSON file says: calls its functions in turn, the last of which makes a contender, and measures that.

    The result replaces the request.
    """
    request, made = json.loads(path.read_text()), None
    for module, function, arguments in request["functions"]:
        made = getattr(importlib.import_module(module), function)(*arguments)
    path.write_text(json.dumps(measured(made, request["calls"], request["enough"])))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
