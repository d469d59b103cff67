"""Time and memory of functions that do the same work, called in turn, with a process for each library.

On a machine that others use too, contenders that are called in turn share its slow moments, and the best call of each is the
one least disturbed. In a process of its own no library's memory is counted as another's, and none fails with another.
"""

import ctypes
import dataclasses
import gc
import importlib.util
import multiprocessing
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import jax

from hybrid_attn.config import Config, Table
from hybrid_attn.train.metrics import peak_flops

OUT_OF_MEMORY = ("allocate memory", "RESOURCE_EXHAUSTED", "Out of memory")  # what PyTorch and XLA say
GIB = 2**30


class Task(NamedTuple):
    """The work of one contender: `make(*args)`, called in the process of `library`, gives a `Ready`."""

    library: str
    make: Callable
    args: tuple


class Ready(NamedTuple):
    """`run` does the work once, to its end; `memory` is what it takes in bytes, or None to watch the process."""

    run: Callable[[], Any]
    memory: int | None


class Measured(NamedTuple):
    """Calls of one contender: their seconds, what they returned, and the bytes that one takes beyond its inputs.

    `missing` says why there are no calls.
    """

    seconds: list[float]
    results: list[Any]
    memory: int | None
    missing: str | None


class Processes:
    """One process for each library, started when it is first needed; use as a context."""

    def __init__(self, limit: int):
        """A contender that wants more than `limit` bytes beyond its inputs is missing from the results."""
        self.limit, self.pools = limit, {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pool in self.pools.values():
            pool.shutdown(cancel_futures=True)

    def call(self, library: str, function: Callable, *args) -> Any:
        """`function(*args)` in the process of `library`; ValueError if the process dies of it."""
        if library not in self.pools:
            self.pools[library] = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        try:
            return self.pools[library].submit(function, *args).result()
        except BrokenProcessPool as cause:
            raise ValueError(f"the process of {library} died, perhaps for want of memory; lower --memory_gib") from cause

    def race(self, title: str, tasks: Mapping[str, Task], repeats: int) -> dict[str, Measured]:
        """Calls every task `repeats` times, in turn; says each call to stderr under `title`."""
        measured = {}
        for turn in range(repeats):
            for name, task in tasks.items():
                if turn == 0:
                    measured[name] = self.call(task.library, _first, name, task, self.limit)
                elif measured[name].missing is None:
                    seconds, result = self.call(task.library, _again, name)
                    measured[name].seconds.append(seconds)
                    measured[name].results.append(result)
                else:
                    continue
                shown = measured[name].missing or f"{measured[name].seconds[-1]:.3g} s"
                print(f"{title}  {turn + 1}/{repeats}  {name}: {shown}", file=sys.stderr, flush=True)
        return measured


def make_matmul(dtype: str) -> Ready:
    """A contender whose calls return the matmul peak of the machine, in FLOP/s."""
    return Ready(lambda: peak_flops(jax.devices()[0], dtype)[0], 0)


def full_attention(c: Config) -> Config:
    """`c` with its first windowed kind in every layer, without the window."""
    windowed = [kind for kind in map(c.model.kinds.get, c.model.layers) if kind.window is not None or kind.chunk is not None]
    if not windowed:
        raise ValueError(f"--config has the layers {c.model.layers}, none with a window: there is nothing to compare")
    kind = dataclasses.replace(windowed[0], window=None, chunk=None)
    return dataclasses.replace(c, model=dataclasses.replace(c.model, pattern="R", kinds=Table({"R": kind})))


def threads() -> int:
    """Processors that this process may use, which are the threads that XLA starts on a CPU."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def can_watch() -> bool:
    """Whether the peak memory of a process can be seen and set back here."""
    return platform.libc_ver()[0] == "glibc" and Path("/proc/self/clear_refs").exists()


def highest_memory() -> int | None:
    """Bytes that were resident at most in this process since a contender was first called; None where that is not watched."""
    return _status("VmHWM") if can_watch() else None


def lengths(texts: Sequence[str]) -> list[int]:
    """Numbers of tokens, as 4096 or 4K, from the shortest; ValueError names the one that is none."""
    for text in texts:
        if not re.fullmatch(r"[1-9][0-9]*K?", text):
            raise ValueError(f"--lengths has {text!r}; write tokens, as 4096 or 4K")
    if not texts:
        raise ValueError("--lengths is empty; write tokens, as 4096 or 4K")
    return sorted({int(text.removesuffix("K")) * (1024 if text.endswith("K") else 1) for text in texts})


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells under their headers, in Markdown; the first two columns to the left."""
    widths = [max(3, *(len(row[i]) for row in (header, *rows))) for i in range(len(header))]
    lines = [header, ["-" * (w - (i > 1)) + ":" * (i > 1) for i, w in enumerate(widths)], *rows]
    return "\n".join("| " + " | ".join(map(_pad, range(len(line)), line, widths)) + " |" for line in lines)


def _pad(column: int, cell: str, width: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)


# --- In the process of a library.

_ready: dict[str, Ready] = {}


def _first(name: str, task: Task, limit: int) -> Measured:
    """Makes a contender and calls it once, watching its memory."""
    _ready.pop(name, None)
    try:
        _ready[name] = task.make(*task.args)
        watched = _ready[name].memory is None and can_watch()
        before = _watch(limit) if watched else None
        seconds, result = _again(name)
        memory = _status("VmHWM") - before if watched else _ready[name].memory
        return Measured([seconds], [result], memory, None)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        _ready.pop(name, None)
        return Measured([], [], None, f"needs more than {limit / GIB:.3g} GiB")


def _again(name: str) -> tuple[float, Any]:
    start = time.perf_counter()
    result = _ready[name].run()
    return time.perf_counter() - start, result


def _watch(limit: int) -> int:
    """Bytes resident now, without what was freed; sets the mark of the highest back to them, and the limit above them."""
    import resource  # Unix has it

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # pages that were freed and kept would be used again unseen
    highest, most = _status("VmData") + limit, resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (highest if most == resource.RLIM_INFINITY else min(highest, most), most))
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def no_transformers(platform: str, dtype: str) -> str | None:
    """Why the other library cannot be compared with here."""
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        return f"{' and '.join(missing)} not installed; install the extra `oracle`"
    return None if platform == "cpu" and dtype == "float32" else f"compared in float32 on a CPU, not in {dtype} on {platform}"
