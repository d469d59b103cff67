"""The machine that measures: its processor, cores, memory and versions, and whether other programs used it meanwhile."""

import importlib.metadata
import os
import platform
import re
import time
from pathlib import Path

import psutil

GIB = 2**30
LIBRARIES = ("jax", "jaxlib", "torch", "transformers")
EXTENSIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")  # widest first; the first two multiply bfloat16
IDLE = 0.05  # the largest share of the processors that others may take of an idle machine


def describe() -> dict:
    """Processor, cores that this process may use, and GiB of memory."""
    memory = psutil.virtual_memory().total / GIB
    return {"processor": processor(), "cores": threads(), "memory_gib": round(memory, 1)}


def threads() -> int:
    """Processors that this process may use, which are the threads that XLA starts on a CPU."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def processor() -> str:
    """Its name, and what tells processors of the same name apart: family, model and vector extensions."""
    path = Path("/proc/cpuinfo")
    fields = dict(re.findall(r"^([^\t:]+?)\s*: (.*)$", path.read_text(), re.MULTILINE)) if path.exists() else {}
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    extensions = [name for name in EXTENSIONS if name in fields.get("flags", "").split()]
    return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']}; {', '.join(extensions)})"


def versions() -> dict[str, str]:
    """Of Python and of the libraries that are installed."""
    installed = {x.metadata["Name"] for x in importlib.metadata.distributions()}
    libraries = {name: importlib.metadata.version(name) for name in LIBRARIES if name in installed}
    return {"python": platform.python_version(), **libraries}


class Watch:
    """Load averages, and the share of all processors that other programs took, from the start of the watch to `stop`."""

    def __init__(self):
        self.load, self.began = os.getloadavg()[0], time.perf_counter()
        self.busy, self.own = _busy(), _own()

    def stop(self) -> dict:
        """Load average of a minute at start and end, and the share of other programs."""
        seconds = (time.perf_counter() - self.began) * psutil.cpu_count()
        others = max(0.0, (_busy() - self.busy) - (_own() - self.own)) / seconds
        return {"load_start": self.load, "load_end": os.getloadavg()[0], "others": others}


def idleness(watched: dict) -> str:
    """A sentence on whether the machine was idle but for the benchmark."""
    was = "was idle otherwise" if watched["others"] <= IDLE else "was NOT idle otherwise"
    load = f"load average {watched['load_start']:.2f} at the start and {watched['load_end']:.2f} at the end"
    return f"The machine {was}: other programs took {watched['others']:.1%} of its processors; {load}."


def _busy() -> float:
    """Seconds that the processors have worked, for programs and for a hypervisor that took them away."""
    times = psutil.cpu_times()
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))


def _own() -> float:
    """Seconds of this process and of all that it started, alive or ended."""
    total, me = 0.0, psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            total += sum(process.cpu_times()[:4])  # user and system, of itself and of its ended children
        except psutil.NoSuchProcess:
            pass
    return total
