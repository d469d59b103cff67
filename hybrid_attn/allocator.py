"""How glibc's malloc treats freed memory."""

import ctypes
import importlib.util
import os
import platform

# Parameters of mallopt (malloc.h): the number of heaps, of allocations that are mappings of their own, and how many free bytes
# at the end of a heap go back to the system, where -1 is never.
M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD = -8, -4, -1
SETTINGS = {M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}
VARIABLES = ("MALLOC_", "GLIBC_TUNABLES")  # environment variables by which users set malloc themselves
ACCELERATORS = ("jax_plugins", "libtpu")  # packages of which JAX has one where it uses a GPU or a TPU


def keep_freed_memory() -> None:
    """Keeps freed memory in the process for later allocations; to be called before threads start.

    On a CPU, XLA allocates the temporaries of a program in every call. By default glibc takes large ones from the system and
    gives them back, and a step of training spends a tenth of its time on page faults. Nothing is done without glibc, beside an
    accelerator, or if an environment variable sets malloc.
    """
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not any(map(importlib.util.find_spec, ACCELERATORS))
    is_set = any(name.startswith(VARIABLES) for name in os.environ)
    if platform.libc_ver()[0] == "glibc" and on_cpu and not is_set:
        for parameter, value in SETTINGS.items():
            ctypes.CDLL(None).mallopt(parameter, value)
