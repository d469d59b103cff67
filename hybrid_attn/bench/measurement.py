"""Time and memory of functions that do the same work, called in turn, with one process for each library.

Contenders that are called in turn are slowed down by the same load of the machine, so that ratios of their medians hold where
seconds do not. Each library has its own process: its memory is measured alone, and its failure ends no other.
"""

import contextlib
import ctypes
import dataclasses
import gc
import importlib.util
import multiprocessing
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import jax

from hybrid_attn import allocator, config
from hybrid_attn.bench import machine
from hybrid_attn.bench.contender import Ready, status
from hybrid_attn.config import Config, Table, reach
from hybrid_attn.convert import families, hf
from hybrid_attn.model import init, specs
from hybrid_attn.parallel.mesh import make_mesh
from hybrid_attn.train.metrics import peak_flops
from hybrid_attn.trees import check

OUT_OF_MEMORY = ("allocate memory", "RESOURCE_EXHAUSTED", "Out of memory")  # what PyTorch and XLA say


def says_out_of_memory(text: str) -> bool:
    return any(said in text for said in OUT_OF_MEMORY)


def does_not_fit(limit: int) -> str:
    return f"needs more than {limit / machine.GIB:.3g} GiB"


class Task(NamedTuple):
    """The work of one contender: `make(*args)`, called in the process of `library`, returns a `Ready`."""

    library: str
    make: Callable
    args: tuple


class Measured(NamedTuple):
    """Calls of one contender: their seconds, those of all processors, results, and bytes of one beyond its inputs.

    `results` has one for the first call too, which warms up and is not timed. `missing` says why there are none.
    """

    seconds: list[float]
    cpu_seconds: list[float]
    results: list[Any]
    memory: int | None
    missing: str | None

    @property
    def record(self) -> dict:
        """What every part records of a contender: its median and best seconds, all of them, and memory; or what is missing."""
        if self.missing:
            return {"missing": self.missing}
        return {
            "seconds": statistics.median(self.seconds),
            "best": min(self.seconds),
            "calls": self.seconds,
            "memory": self.memory,
        }


class Processes(contextlib.AbstractContextManager):
    """One process for each library, started when it is first needed; use as a context."""

    def __init__(self, limit: int):
        """A contender that needs more than `limit` bytes beyond its inputs is missing from the results."""
        self.limit, self.pools = limit, {}

    def __exit__(self, *_):
        for pool in self.pools.values():
            pool.shutdown(cancel_futures=True)

    def call(self, library: str, function: Callable, *args) -> Any:
        """`function(*args)` in the process of `library`; ValueError if the process dies."""
        if library not in self.pools:
            set_malloc = allocator.keep_freed_memory if library == "jax" else None  # as our programs do
            self.pools[library] = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), set_malloc)
        try:
            return self.pools[library].submit(function, *args).result()
        except BrokenProcessPool as cause:
            raise ValueError(f"the process of {library} died, perhaps because memory ran out; lower --memory_gib") from cause

    def race(self, title: str, tasks: Mapping[str, Task], repeats: int, shortest: float = 0.0) -> dict[str, Measured]:
        """Calls every task once to warm up and then `repeats` times, in turn; prints each call to stderr under `title`.

        In place of a call of less than `shortest` seconds come as many as take that long, of which the mean counts: the first
        after those of another process finds its caches and the clock of the processor as that left them.
        """
        measured = {}
        for turn in range(repeats + 1):
            for name, task in tasks.items():
                if turn == 0:
                    measured[name] = self.call(task.library, _first, name, task, self.limit)
                    shown = measured[name].missing or "warm"
                elif measured[name].missing is None:
                    seconds, cpu_seconds, result = self.call(task.library, _again, name, shortest)
                    measured[name].seconds.append(seconds)
                    measured[name].cpu_seconds.append(cpu_seconds)
                    measured[name].results.append(result)
                    shown = f"{seconds:.3g} s"
                else:
                    continue
                print(f"{title}  {turn}/{repeats}  {name}: {shown}", file=sys.stderr, flush=True)
        return measured


def platform_here() -> str:
    """cpu, gpu or tpu; in a process of its own, because it takes the devices."""
    return jax.default_backend()


def make_matmul(dtype: str) -> Ready:
    """A contender whose calls return the matmul peak of the machine, in FLOP/s."""
    return Ready(lambda: peak_flops(jax.devices()[0], dtype)[0], 0)


def full_attention(c: Config) -> Config:
    """`c` with its first windowed layer type in every layer, without the window; a scheme that needs a window is "auto"."""
    windowed = [letter for letter in c.model.layers if reach(c.model.kinds[letter])]
    check(len(windowed) > 0, f"--config has the layers {c.model.layers}, none with a window: there is nothing to compare")
    letter, model = windowed[0], c.model
    full = dataclasses.replace(model.kinds[letter], window=None, chunk=None)
    scheme = config.context(model, c.train)[letter]
    changes = {"remat": config.remat(model, c.train)[letter], "context": "auto" if scheme == "halo" else scheme}
    model = dataclasses.replace(model, prefix="", pattern="R", kinds=Table({"R": full}))
    return dataclasses.replace(c, model=model, train=dataclasses.replace(c.train, **changes))


def can_watch() -> bool:
    """Whether the peak memory of a process can be read and reset on this system."""
    return platform.libc_ver()[0] == "glibc" and Path("/proc/self/clear_refs").exists()


def highest_memory() -> int | None:
    """Peak resident bytes of this process since a contender was first called; None where they cannot be read."""
    return status("VmHWM") if can_watch() else None


def lengths(texts: Sequence[str], flag: str = "--lengths", unit: str = "tokens") -> list[int]:
    """Sorted numbers from texts such as 4096, 4K or 1M, in units of 1024; ValueError names the flag and an invalid one."""
    check(len(texts) > 0, f"{flag} is empty; write {unit}, as 4096, 4K or 1M")
    for text in texts:
        check(bool(re.fullmatch(r"[1-9][0-9]*[KM]?", text)), f"{flag} has {text!r}; write {unit}, as 4096, 4K or 1M")
    return sorted({int(text.rstrip("KM")) * {"K": 1024, "M": 1024**2}.get(text[-1], 1) for text in texts})


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells under their headers, in Markdown; the first two columns to the left, and dashes where a row is too short."""
    rows = [[*row, *["—"] * (len(header) - len(row))] for row in rows]
    widths = [max(3, *(len(row[i]) for row in (header, *rows))) for i in range(len(header))]
    lines = [header, ["-" * (w - (i > 1)) + ":" * (i > 1) for i, w in enumerate(widths)], *rows]
    return "\n".join("| " + " | ".join(map(_pad, range(len(line)), line, widths)) + " |" for line in lines)


def _pad(column: int, cell: str, width: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)


def missing(records: Sequence[dict], name: Callable[[dict], str] | None = None) -> str:
    """Lines that say why records have no numbers; `name` is what is missing, by default the contender at a number of tokens."""
    name = name or (lambda r: f"{r['contender']}, {r['tokens']:,} tokens")
    lines = dict.fromkeys(f"— {name(r)}: {r['missing']}" for r in records if "missing" in r)
    return "".join(f"\n\n{line}" for line in lines)


def gib(size: int | None) -> str:
    return "—" if size is None else f"{size / machine.GIB:.2f}"


# --- The same model in `transformers`.


def no_transformers(platform: str, dtype: str) -> str:
    """Why `transformers` cannot be compared with here, empty if it can."""
    absent = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if absent:
        return f"{' and '.join(absent)} not installed; install the extra `oracle`"
    return not_in_float32_on_cpu(platform, dtype)


def not_in_float32_on_cpu(platform: str, dtype: str) -> str:
    """Why another library is not compared with here, empty if it is."""
    return "" if (platform, dtype) == ("cpu", "float32") else f"compared in float32 on a CPU, not in {dtype} on {platform}"


def export(values: dict, directory: str, max_len: int) -> list[str]:
    """Exports the initial parameters of a config; returns the names of the tensors with weight decay."""
    c = config.build(values)
    with jax.set_mesh(make_mesh(c.mesh, jax.devices()[:1])):
        params = jax.jit(init, static_argnums=0)(c.model, jax.random.key(c.seed))
    has_decay = hf.flat(jax.tree.map(lambda spec: spec.decay, specs(c.model)))
    shapes = {path: x.shape for path, x in hf.flat(params).items()}
    description = hf.describe(c.model, directory, max_len)
    hf.write(directory, c.model, description, shapes, hf.by_period(params), "float32")
    tensors = families.tensors(c.model, description["model_type"], shapes)
    return [tensor.name for tensor in tensors if has_decay[tensor.pieces[0].path]]


# --- In the process of a library.

_ready: dict[str, Ready] = {}


def _first(name: str, task: Task, limit: int) -> Measured:
    """Makes a contender and calls it once; measures its memory."""
    _ready.pop(name, None)
    try:
        _ready[name] = task.make(*task.args)
        watched = _ready[name].memory is None and can_watch()
        before = _watch(limit) if watched else None
        result = _ready[name].run()
        memory = status("VmHWM") - before if watched else _ready[name].memory
        return Measured([], [], [result], memory, None)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not says_out_of_memory(str(error)):
            raise
        _ready.pop(name, None)
        return Measured([], [], [], None, does_not_fit(limit))


def _again(name: str, shortest: float) -> tuple[float, float, Any]:
    """Mean seconds, and those of all processors, of the calls that take `shortest` seconds together; the result of the last."""
    start, cpu_start, calls = time.perf_counter(), time.process_time(), 0
    while not calls or time.perf_counter() - start < shortest:
        result, calls = _ready[name].run(), calls + 1
    return (time.perf_counter() - start) / calls, (time.process_time() - cpu_start) / calls, result


def _watch(limit: int) -> int:
    """Returns the resident bytes, after freed memory is given back; resets the peak and limits the process to `limit` more."""
    import resource  # Unix has it

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that is freed and kept could be used again without being counted
    soft, hard = status("VmData") + limit, resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")
