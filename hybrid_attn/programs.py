"""What programs have in common: flags, that of a config among them, and errors that are a line."""

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
from absl import flags

GRACE = 2  # seconds in which a program that was interrupted ends by itself


def parse(argv: list[str]) -> list[str]:
    """Reads the flags; a key that does not exist or a config that cannot be read is a line on stderr and exit status 2."""
    try:
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS and flags.FLAGS["config"].present:
            path = flags.FLAGS["config"].config_filename.partition(":")[0]
            if not Path(path).is_file():
                fail(f"--config={path}: no such file, seen from {Path.cwd()}", 2)
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        fail(reason(error), 2)


def run(program: Callable[[], None], argv: Sequence[str], held: str, interrupted: str = "interrupted") -> None:
    """Runs a program that takes flags alone; what is wrong is a line on stderr and exit status 2, and Ctrl-C is 130.

    `held` is what the memory of a device may be too small for.
    """
    logging.getLogger().setLevel(logging.WARNING)

    def end():
        print(f"error: {interrupted}", file=sys.stderr, flush=True)
        os._exit(130)  # not by SystemExit: a compilation that was interrupted crashes jax where it tidies up

    def interrupt(*_):
        last = threading.Timer(GRACE, end)  # the exception may arise in a callback of jax, which swallows it
        last.daemon = True
        last.start()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        if argv[1:]:
            raise ValueError(f"{' '.join(argv[1:])!r} is no flag; quote what has spaces")
        program()
    except (ValueError, NotImplementedError, ImportError, OSError) as error:
        fail(reason(error), 2)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fail(f"the memory of a device does not hold {held}: {reason(error)}", 2)
    except KeyboardInterrupt:
        end()
    finally:
        signal.signal(signal.SIGINT, before)


def pairs(flag: str, text: str, types: Mapping[str, type]) -> dict:
    """The values of "a=1,b=x", of the types that `types` has for the names; `flag` is all that was written."""
    found = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in types:
            raise ValueError(f"{flag} names {name!r}, and has only {', '.join(types)}")
        try:
            found[name] = types[name](value)
        except ValueError:
            raise ValueError(f"{flag}: {name}={value!r} must be of type {types[name].__name__}") from None
    return found


def reason(error: Exception) -> str:
    """What an error says in a line: absl hands on whole tracebacks, and ml_collections quotes the key twice over."""
    near = re.search(r'Did you mean "(.+?)" instead of "(.+?)"', str(error))
    if near:
        return f"unknown config key {near[2]!r}; did you mean {near[1]!r}?"
    if isinstance(error, (AttributeError, KeyError)):
        return f"unknown config key {error.args[0]}"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if "Traceback" in str(error) else " ".join(lines)


def fail(message: str, status: int):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
