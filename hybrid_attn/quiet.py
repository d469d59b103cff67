"""Suppresses tracebacks that libraries print of errors which this package reports itself."""

import logging
import sys
import threading
import traceback
import types

LIBRARIES = ("orbax", "tensorstore")  # an error of their threads is raised again in the thread that waits for them


def silence_libraries() -> None:
    """Keeps tracebacks of checkpoint libraries off stderr; those of everything else are printed as before."""
    logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and _is_of_a_library(record.exc_info[2])))
    # Orbax alone has asyncio read here. It raises the first failure, and asyncio logs those of the other reads, often without a
    # frame of Orbax.
    logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
    unraisable, in_a_thread = sys.unraisablehook, threading.excepthook

    def after_the_first_failure(args):
        if isinstance(args.exc_value, KeyboardInterrupt):
            return  # in a callback of jax, which swallows it; `programs.run` ends the program and says so
        # TensorStore tells Orbax's event loop that a read has failed, after that loop was closed by the first failure; a read
        # that fails after the first one is dropped with its coroutine.
        closed = isinstance(args.exc_value, RuntimeError) and str(args.exc_value) == "Event loop is closed"
        if not closed and not _is_of_a_library(args.exc_traceback):
            unraisable(args)

    def unless_raised_again(args):
        if not _is_of_a_library(args.exc_traceback):
            in_a_thread(args)

    sys.unraisablehook, threading.excepthook = after_the_first_failure, unless_raised_again


def _is_of_a_library(trace: types.TracebackType | None) -> bool:
    """Whether a frame of a traceback is of a file of these libraries."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace)]
    return any(f"/{name}/" in file for file in files for name in LIBRARIES)
