"""A program on a CPU keeps the memory that it frees, unless its user has set malloc."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The page faults of twenty arrays of 32 MiB in a thread, one after the other, after the first.
PROGRAM = """
import resource
import threading
import numpy as np
from hybrid_attn import programs

def arrays():
    for i in range(21):
        np.full(2**22, 1.0)
        first = first if i else resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first)

def program():
    thread = threading.Thread(target=arrays)  # XLA allocates in threads of its own
    thread.start()
    thread.join()

programs.run(program, ["program"])
"""


def page_faults(**variables: str) -> int:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "MALLOC_", "GLIBC_"))}
    # By default numpy asks for huge pages, of which the system may have none.
    environment = inherited | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "NUMPY_MADVISE_HUGEPAGE": "0"} | variables
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_freed_memory_is_used_again_without_page_faults():
    pages = 20 * 2**25 // os.sysconf("SC_PAGE_SIZE")
    assert page_faults() < pages // 100
    assert page_faults(MALLOC_TOP_PAD_="131072") > pages // 2
