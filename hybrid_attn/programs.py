"""Shared by the command-line programs: flags, config flags among them, one-line errors, exit codes and Ctrl-C.

Exit codes: 0 done; 1 a failure while running; 2 a wrong flag, config or input; 130 Ctrl-C.
"""

import atexit
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence

from absl import app, flags

from hybrid_attn import allocator, config_file, quiet
from hybrid_attn.characters import visible

GRACE = 2  # seconds after Ctrl-C in which a program may end by itself
ARRAYS = "the arrays of this program"  # what did not fit if a device runs out of memory
# Errors that another flag, config or input cures, and errors of the machine or of the computation.
INPUT_ERRORS = (
    ValueError, NotImplementedError, ImportError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError,
    PermissionError,
)  # fmt: skip
FAILURES = (FloatingPointError, OSError)
NO_BACKEND = ("Unable to initialize backend", "Unknown backend")
RENAMED_FLAGS = {"rows": "batch_size"}  # names of earlier versions, and today's


def parse(argv: list[str]) -> list[str]:
    """Reads the flags; a wrong flag, an unknown key or an unreadable config is one line on stderr and exit code 2."""
    try:
        return config_file.parse(argv)
    except flags.UnrecognizedFlagError as error:
        today = RENAMED_FLAGS.get(error.flagname)
        fail(f"--{error.flagname} is now called --{today}" if today in flags.FLAGS else one_line(str(error)), 2)
    except (flags.Error, OSError, ValueError) as error:
        fail(one_line(message(error)), 2)


def start(main: Callable[[Sequence[str]], None], module: str) -> None:
    """Runs the `main` of a module with the command line; --help shows the module's docstring and its flags."""
    sys.modules["__main__"].__doc__ = sys.modules[module].__doc__
    for name in (module, config_file.__name__):
        for flag in flags.FLAGS.get_key_flags_for_module(name):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.run(main, flags_parser=parse)


def run(
    program: Callable, argv: Sequence[str], memory_for: str = ARRAYS, interrupted: str = "interrupted", arguments: int = 0
) -> None:
    """Runs `program` and exits with the code that it returns, if any; an error is one line on stderr, see `exit_code`.

    `argv` is what `parse` returns, with at most `arguments` arguments besides flags. `memory_for` says what did not fit if a
    device runs out of memory.
    """
    allocator.keep_freed_memory()  # before `watch` starts a thread
    logging.getLogger().setLevel(logging.WARNING)
    quiet.silence_libraries()
    ending = threading.Lock()

    def end():
        ending.acquire()  # and never released: of the main thread and those that watch it, only the first prints
        print(f"error: {interrupted}", file=sys.stderr, flush=True)
        os._exit(130)  # not SystemExit: after an interrupted compilation the cleanup of jax crashes

    def interrupt(_, frame):
        frames = (called for called, _ in traceback.walk_stack(frame))
        if any(called.f_code.co_filename.startswith("<frozen importlib") for called in frames):
            end()  # in an import, an exception is lost, or crashes a partly loaded library (jaxlib)
        last = threading.Timer(GRACE, end)  # a callback of jax may swallow the exception
        last.daemon = True
        last.start()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    unwatch = watch(signal.SIGINT, interrupt, end)
    try:
        check_arguments(argv, arguments)
        code = program(*argv[1:])
    except KeyboardInterrupt:
        end()
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        fail(one_line(message(error, memory_for)), code)
    finally:
        unwatch()
        signal.signal(signal.SIGINT, before)
        # Ctrl-C while the interpreter shuts down would print a traceback of a library that cleans up.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    if code:
        sys.exit(code)


class Interrupt:
    """Ctrl-C in a body that `run` runs: from `begin` on, the first one sets `requested`, and the next one ends the program."""

    requested, _before = False, None

    def __enter__(self) -> "Interrupt":
        return self

    def begin(self) -> None:
        """Ctrl-C does from here on what the class says; further calls change nothing."""
        if self._before is None:
            self._before = signal.signal(signal.SIGINT, self._handle)

    def __exit__(self, *_) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, number, frame) -> None:
        if self.requested:
            self._before(number, frame)
        self.requested = True


def watch(number: int, handler: Callable, end: Callable[[], None]) -> Callable[[], None]:
    """Calls `end` `GRACE` seconds after a signal whose handler is `handler`; the result is a function that stops the watch.

    Python calls a handler only between two instructions of the main thread, which may be compiling for minutes.
    """
    (reader, writer), ended = os.pipe(), threading.Event()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def listen():
        while received := os.read(reader, 1):
            if received[0] == number and signal.getsignal(number) is handler and not ended.wait(GRACE):
                end()
        os.close(reader)

    def unwatch():
        ended.set()
        signal.set_wakeup_fd(before)
        os.close(writer)  # ends the thread

    threading.Thread(target=listen, daemon=True).start()
    return unwatch


def check_arguments(argv: Sequence[str], most: int = 0) -> None:
    """ValueError if a command line has more than `most` arguments besides flags."""
    extra = argv[1 + most :]
    if extra:
        raise ValueError(f"{' '.join(extra)!r} is no flag: flags begin with --, and text with spaces is quoted")


def exit_code(error: Exception) -> int | None:
    """2 for a wrong input, 1 for a failure while running, None for a bug, whose traceback is printed."""
    # JAX_PLATFORMS names a platform of which jax found no device.
    lacks_backend = isinstance(error, RuntimeError) and str(error).startswith(NO_BACKEND)
    if isinstance(error, INPUT_ERRORS) or out_of_memory(error) or lacks_backend:
        return 2
    return 1 if isinstance(error, FAILURES) else None


def out_of_memory(error: Exception) -> bool:
    """Whether a device's memory was too small. Compared by name, because importing jax takes a second."""
    return type(error).__name__ == "JaxRuntimeError" and any(x in str(error) for x in ("RESOURCE_EXHAUSTED", "Out of memory"))


def pairs(flag: str, text: str, types: Mapping[str, type]) -> dict:
    """The values of "a=1,b=x", of the types that `types` has for the names; `flag` is the flag as it was written."""
    values = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in types:
            raise ValueError(f"{flag} names {name!r}, and has only {', '.join(types)}")
        try:
            values[name] = types[name](value)
        except ValueError:
            raise ValueError(f"{flag}: {name}={value!r} must be of type {types[name].__name__}") from None
    return values


def message(error: Exception, memory_for: str = ARRAYS) -> str:
    """The text of an error, with its file, or with `memory_for` if a device ran out of memory."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return f"a device has too little memory for {memory_for}: {error}" if out_of_memory(error) else str(error)


def one_line(text: str) -> str:
    return " ".join(line for line in text.splitlines() if line.strip())


def fail(message: str, code: int):
    print(f"error: {visible(message)}", file=sys.stderr)  # which may quote a file
    sys.exit(code)
