"""Several processes that train as one: how they find each other, stop after the same step and end together.

Each process keeps a connection to the hub of process 0 (hub.py) at the coordinator's address; JAX's own service listens at the
next port. A stopped process, or a machine that disappears, is given up after `SILENCE` seconds without a message.
"""

import atexit
import contextlib
import math
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import TextIO

import jax

from hybrid_attn.parallel import launchers
from hybrid_attn.parallel.hub import GONE, MAX_ERROR_LENGTH, SILENCE, SILENT, Heartbeat, Hub, Link, delay_aborts, listen
from hybrid_attn.trees import check

# JAX gives up a silent process, too, and aborts all processes without the cause. Its timeout is this many times the hub's, so
# that the hub reports the cause first.
JAX_TIMEOUT_FACTOR = 10
LOOPBACK = ("localhost", "127.0.0.1", "::1")
PRINTING = threading.Lock()


class Peers:
    """The other processes of a run: they stop after the same step, and an error of one ends all."""

    def __init__(self, number: int, link: Link, hub: Hub | None, silence: float = SILENCE):
        self.number, self._link, self._hub, self._silence = number, link, hub, silence
        self._step, self._stop_at, self._exit_message, self._status = -1, None, None, None
        self._agreeing = threading.Lock()  # held while the processes agree on the last step
        self._same = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def agree(self, run: Mapping[str, str]) -> None:
        """Waits for all to call this, and perhaps again; if a field of `run` differs, all end with exit code 2 and name it."""
        self._same.clear()
        self._link.send(run=dict(run))
        self._same.wait()

    def request_stop(self) -> None:
        """Has all processes stop after the same step, soon; a signal handler may call this."""
        self._link.send(stop=True)

    def reached(self, step: int) -> bool:
        """Whether the run ends before its step `step`, counted from 0: the same answer in every process."""
        with self._agreeing:
            self._step = step
            return self._stop_at is not None and step >= self._stop_at

    def stop_requested(self) -> bool:
        """Whether the processes have agreed to stop, after this step or a later one."""
        return self._stop_at is not None

    def all_saved(self, message: str) -> None:
        """Once all have called this, a request to stop ends them at once, with exit status 0; process 0 prints `message`."""
        self._exit_message = message
        self._link.send(saved=True)

    def fail(self, text: str, status: int, details: str = "") -> None:
        """Ends all processes with this error; this one prints `details` first.

        The others exit with 2 if `status` is 2 (a wrong input), else with 1. If several fail, all print the first error and
        have its code. A `status` other than 1 and 2, such as 130 after Ctrl-C, is that of this process in any case.
        """
        self._status = status
        if details:
            with PRINTING:
                _print(details, sys.stderr)
        self._link.send(failed=text[:MAX_ERROR_LENGTH], status=status)
        time.sleep(10)  # `_listen` ends this process earlier, when the others have the error
        _end(f"error: {text}", status)

    def close(self) -> None:
        """Reports that this process is done; process 0 waits for the others."""
        self._link.send(done=True)
        if self._hub:
            self._hub.join(10)

    def _listen(self) -> None:
        """Handles the messages of the hub and sends pings, until all processes are done or one has failed."""
        heartbeat, over, selector = Heartbeat([self._link], self._silence), False, selectors.DefaultSelector()
        selector.register(self._link.connection, selectors.EVENT_READ)
        while not over:
            readable = heartbeat.select(selector, self._link.send)
            silence = heartbeat.silence(self._link)
            if not readable and silence > self._silence and self._hub is None:
                text = f"process 0{SILENT.format(silence)}"
                self._link.send(failed=text, status=1)  # process 0 reads it if it continues
                self._end_with_others(text, 1)
            try:
                for message in self._link.receive() if readable else ():
                    over |= self._handle(message)
            except (OSError, ValueError) as error:
                if self._hub is None:
                    text = GONE if isinstance(error, OSError) else f" sent an invalid message: {error}"
                    self._end_with_others(f"process 0{text}", 1)
                return

    def _handle(self, message: Mapping) -> bool:
        """Handles a message of the hub; True if it was the last one."""
        match message:
            case {"error": str(text), "code": int(code)}:
                self._end_with_others(text, code)
            case {"same": True}:
                self._same.set()
            case {"agree": True}:
                self._agreeing.acquire()  # the main thread waits at its next step
                self._link.send(at=self._step)
            case {"stop_at": int(step)}:
                self._stop_at = step
                self._agreeing.release()
            case {"leave": True}:
                if self.number == 0:
                    _print(self._exit_message, sys.stdout)
                self.close()
                _end(None, 0)
            case {"ping": True} | {"over": True}:
                pass
            case _:
                raise ValueError(str(message)[:100])
        return "over" in message

    def _end_with_others(self, text: str, code: int) -> None:
        """Ends this process with the first error of the run and its code, or with its own status if that is neither 1 nor 2.

        Its own 2 (a wrong input) may only look like one after another process died: a file that the other should have written.
        Its own 1 may follow from the error of another, which breaks what they compute together.
        """
        _end(f"error: {text}", code if self._status in (None, 1, 2) else self._status)


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = 300,
    silence: float = SILENCE,
) -> Peers | None:
    """Joins the processes of this run, before JAX uses a device; None, without any network, for a single process.

    The arguments, or else the launcher (SLURM, Open MPI, a TPU pod or Kubernetes), say how many processes there are and which
    one this is. With HYBRID_RUN_TOKEN in the environment of process 0, only processes with the same token can join.
    ValueError for arguments that do not fit together; OSError that names those which have not joined after `timeout` seconds.
    A process is given up after `silence` seconds without a message.
    """
    check(0 < timeout < math.inf, f"--join_timeout={timeout} is no number of seconds that all could wait")
    membership = launchers.from_flags(coordinator, num_processes, process_id) or launchers.from_launcher(timeout)
    if membership is None:
        return None
    address, count, number, device_ids = membership
    host, _, port = address.rpartition(":")
    host, port = host.strip("[]"), int(port)
    jax_port = port + 1 if port < 2**16 - 1 else port - 1
    bind = host if host in LOOPBACK else ""  # a loopback address is not reachable from elsewhere
    token = os.environ.get("HYBRID_RUN_TOKEN", "")
    hub = Hub(bind, port, count, timeout, silence, token) if number == 0 else None
    if hub:
        try:
            listen(bind, jax_port).close()  # JAX's service crashes if it cannot listen
        except OSError:
            hub.server.close()
            raise
        hub.start()
    peers = Peers(number, _join((host, port), number, count, timeout, token), hub, silence)
    atexit.register(peers.close)  # registered before JAX's handler, so it runs after it: a process that is done is not missing
    jax.config.update("jax_enable_preemption_service", False)  # it would replace the SIGTERM handler of the training loop
    _silence_gloo()
    try:
        jax.distributed.initialize(
            f"{_bracketed(host)}:{jax_port}",
            num_processes=count,
            process_id=number,
            local_device_ids=device_ids,
            cluster_detection_method="deactivate",
            coordinator_bind_address=f"{_bracketed(bind or '::')}:{jax_port}",
            heartbeat_timeout_seconds=math.ceil(JAX_TIMEOUT_FACTOR * silence),
        )
    except Exception as cause:
        peers.fail(f"jax.distributed at port {jax_port} of {host}: {cause}", 1)
    return peers


def _join(address: tuple[str, int], number: int, count: int, timeout: float, token: str = "") -> Link:
    """A connection to the hub, once all processes have one."""
    host, port = address
    until, cause = time.monotonic() + timeout, None
    while time.monotonic() < until:
        try:
            link = Link(socket.create_connection(address, timeout=5))
            break
        except OSError as error:
            cause = error
            time.sleep(0.2)
    else:
        raise OSError(
            f"process 0 never joined: nothing answered process {number} at {host}:{port} within {timeout:g} s ({cause}); look "
            "at its log, or give it more time with --join_timeout"
        )
    link.send(join=number, of=count, token=token)
    messages, until = [], time.monotonic() + timeout + 30  # the timeout of the hub may have begun later
    try:
        while not messages:
            link.connection.settimeout(max(until - time.monotonic(), 0.001))
            messages = link.receive()
    except OSError:
        raise OSError(f"process 0 disconnected from {host}:{port} before all had joined; look at its log") from None
    except ValueError as error:
        raise OSError(f"the program at {host}:{port} is not process 0 of a run: {error}; name another port") from None
    for message in messages:
        match message:
            case {"error": str(text), "code": int(code)}:
                raise ValueError(text) if code == 2 else OSError(text)
    link.connection.settimeout(None)
    return link


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _silence_gloo() -> None:
    """Redirects file descriptor 1, to which gloo writes a line for each group of devices, to /dev/null; sys.stdout stays."""
    sys.stdout.flush()
    sys.stdout = open(os.dup(1), "w", encoding=sys.stdout.encoding)
    with open(os.devnull, "wb") as devnull:
        os.dup2(devnull.fileno(), 1)


def _end(line: str | None, status: int) -> None:
    """Ends the process now, wherever its main thread hangs; `line` is the last one on its stderr."""
    delay_aborts()
    PRINTING.acquire(timeout=5)  # and never released: another thread ends its line, unless stderr is blocked
    if line:
        with contextlib.suppress(Exception):
            stderr = os.dup(sys.stderr.fileno())
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, sys.stderr.fileno())  # the main thread may fail now, and would print its traceback
            time.sleep(0.1)  # for output of the main thread that is on its way
            os.write(stderr, f"{line}\n".encode())
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(status)


def _print(line: str, stream: TextIO) -> None:
    """Prints a line; a closed stream is ignored."""
    with contextlib.suppress(Exception):
        print(line, file=stream, flush=True)
