"""Builds the CPU attention kernel in C++ for this machine: hybrid-build-kernel, or `make native` in the repository

It needs a C++ compiler ($CXX, or c++) that knows -march=native. `train.kernel="auto"` then means this kernel on CPUs. The
library is written beside its source, in the installed package.
"""

import functools

from hybrid_attn import programs
from hybrid_attn.kernels import native


def build_kernel() -> None:
    native.build()
    print(native.LIBRARY)


def main(argv):
    programs.run(build_kernel, argv)


start = functools.partial(programs.start, main, __name__)  # the console script
