"""Several processes that train as one: how they find each other, stop after the same step and end together.

Each keeps a connection to the hub of process 0 (hub.py) at the coordinator's address; jax's own service listens at the port
after it. A process that has stopped, or a machine that vanishes, is noticed by its silence, within `SILENCE` seconds.
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
from hybrid_attn.parallel.hub import GONE, LONGEST_TEXT, LOOPBACK, SILENCE, SILENT, Hub, Link, Watch, hold_aborts, listen

# jax notices silence, too, and aborts every process, without the cause: later than the hub, which says it.
JAX_SILENCES = 10
SPEAKING = threading.Lock()


class Peers:
    """What a process shares with the others of its run: where all stop, and the error that ends all."""

    def __init__(self, number: int, link: Link, hub: Hub | None, silence: float = SILENCE):
        self.number, self._link, self._hub, self._silence = number, link, hub, silence
        self._step, self._stop_at, self._last_words, self._status = -1, None, None, None
        self._agreeing = threading.Lock()  # held while the others say which steps they have reached
        self._same = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def agree(self, run: Mapping[str, str]) -> None:
        """Waits until all have called this; if their runs differ in a field, all end with exit code 2 and say in which.

        All may call it again, for what they learn of their runs later.
        """
        self._same.clear()
        self._link.send(run=dict(run))
        self._same.wait()

    def ask_to_stop(self) -> None:
        """All processes will stop after the same step, which comes soon; a signal handler may call this."""
        self._link.send(stop=True)

    def reached(self, step: int) -> bool:
        """Whether the run ends before its step `step`, counted from 0: the same answer in every process."""
        with self._agreeing:
            self._step = step
            return self._stop_at is not None and step >= self._stop_at

    def asked(self) -> bool:
        """Whether the processes have agreed to stop, after this step or a later one."""
        return self._stop_at is not None

    def all_saved(self, last_words: str) -> None:
        """When all have called this, a request to stop ends them at once, with exit status 0; process 0 says `last_words`."""
        self._last_words = last_words
        self._link.send(saved=True)

    def fail(self, text: str, status: int, details: str = "") -> None:
        """Ends this process with `status`, the others with 2 if that is 2 (a wrong input), else with 1.

        Each says the first error, after this one has said `details`.
        """
        self._status = status
        if details:
            with SPEAKING:
                _say(details, sys.stderr)
        self._link.send(failed=text[:LONGEST_TEXT], status=status)
        time.sleep(10)  # `_listen` ends this process before that, when the others know
        _end(f"error: {text}", status)

    def close(self) -> None:
        """Says that this process has done its part; process 0 waits for the others."""
        self._link.send(done=True)
        if self._hub:
            self._hub.join(10)

    def _listen(self) -> None:
        """Hears the hub, and lets it hear this process, until all are done or one has failed."""
        watch, over, selector = Watch([self._link], self._silence), False, selectors.DefaultSelector()
        selector.register(self._link.connection, selectors.EVENT_READ)
        while not over:
            if watch.ping_is_due():
                self._link.send(ping=True)
            heard = selector.select(watch.until_ping())
            silence = watch.silence(self._link)
            if not heard and silence > self._silence and self._hub is None:
                text = f"process 0{SILENT.format(silence)}"
                self._link.send(failed=text, status=1)  # which it reads if it goes on
                self._end_with_others(text, 1)
            try:
                for message in self._link.receive() if heard else ():
                    over |= self._take(message)
            except (OSError, ValueError) as error:
                if self._hub is None:
                    text = GONE if isinstance(error, OSError) else f" sent what no process of a run sends: {error}"
                    self._end_with_others(f"process 0{text}", 1)
                return

    def _take(self, message: Mapping) -> bool:
        """Does what the hub says; whether it was its last message."""
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
                self._leave()
            case {"ping": True} | {"over": True}:
                pass
            case _:
                raise ValueError(str(message)[:100])
        return "over" in message

    def _end_with_others(self, text: str, code: int) -> None:
        """Ends this process with the first error of the run, and with the exit status of its own error if it has one.

        An own status of 2 (a wrong input) counts only if the run's is 2: without another process an input may look wrong,
        such as a file that the other was to write.
        """
        _end(f"error: {text}", code if self._status in (None, 2) else self._status)

    def _leave(self) -> None:
        if self.number == 0:
            _say(self._last_words, sys.stdout)
        self.close()
        _end(None, 0)


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = 300,
    silence: float = SILENCE,
) -> Peers | None:
    """Joins the processes of this run, before anything touches a device; None, and no network, if it is the only one.

    Who they are says whoever calls, or else the launcher: SLURM, Open MPI, a TPU pod or Kubernetes. With HYBRID_RUN_TOKEN in
    the environment of process 0, only processes with the same can join. ValueError where that does not fit together; OSError
    that names who is missing if not all have come after `timeout` seconds. A process is given up after `silence` seconds.
    """
    if not 0 < timeout < math.inf:
        raise ValueError(f"--join_timeout={timeout} is no number of seconds that all could wait")
    found = launchers.given(coordinator, num_processes, process_id) or launchers.detected(timeout)
    if found is None:
        return None
    address, count, number, device_ids = found
    host, _, port = address.rpartition(":")
    host, port, jax_port = host.strip("[]"), int(port), _jax_port(int(port))
    bind = host if host in LOOPBACK else ""  # what all have on this machine, nobody elsewhere shall reach
    token = os.environ.get("HYBRID_RUN_TOKEN", "")
    hub = None
    if number == 0:
        hub = Hub(bind, port, count, timeout, silence, token)
        try:
            listen(bind, jax_port).close()  # jax's service crashes where it cannot listen
        except OSError:
            hub.server.close()
            raise
        hub.start()
    link = _join((host, port), number, count, timeout, token)
    peers = Peers(number, link, hub, silence)
    atexit.register(peers.close)  # before jax's own, and therefore run after it: nobody is missed who is only done
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from the loop
    _silence_gloo()
    try:
        jax.distributed.initialize(
            f"{_bracketed(host)}:{jax_port}",
            num_processes=count,
            process_id=number,
            local_device_ids=device_ids,
            cluster_detection_method="deactivate",
            coordinator_bind_address=f"{_bracketed(bind or '::')}:{jax_port}",
            heartbeat_timeout_seconds=math.ceil(JAX_SILENCES * silence),
        )
    except Exception as cause:
        peers.fail(f"jax.distributed at port {jax_port} of {host}: {cause}", 1)
    return peers


def _join(address: tuple[str, int], number: int, count: int, timeout: float, token: str = "") -> Link:
    """A connection to the hub, after everyone has one."""
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
            "at what it said when it started, or give it more time with --join_timeout"
        )
    link.send(join=number, of=count, token=token)
    messages, until = [], time.monotonic() + timeout + 30  # the hub began after this process at the latest when it answered
    try:
        while not messages:
            link.connection.settimeout(max(until - time.monotonic(), 0.001))
            messages = link.receive()
    except OSError:
        raise OSError(f"process 0 went away from {host}:{port} before all had joined; look at what it said") from None
    except ValueError as error:
        raise OSError(f"what answers at {host}:{port} is not process 0 of a run: {error}; name another port") from None
    for message in messages:
        match message:
            case {"error": str(text), "code": int(code)}:
                raise ValueError(text) if code == 2 else OSError(text)
    link.connection.settimeout(None)
    return link


def _jax_port(port: int) -> int:
    return port + 1 if port < 2**16 - 1 else port - 1


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _silence_gloo() -> None:
    """Gives file 1 away, to which gloo writes a line for each group of devices; Python's own output goes on where it went."""
    sys.stdout.flush()
    sys.stdout = open(os.dup(1), "w", encoding=sys.stdout.encoding)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)


def _end(line: str | None, status: int) -> None:
    """Ends the process now, wherever its main thread hangs; `line` is the last on its standard error."""
    hold_aborts()
    SPEAKING.acquire(timeout=5)  # and kept: what another thread has begun to say is said, unless nobody reads it
    if line:
        with contextlib.suppress(Exception):
            spoken = os.dup(sys.stderr.fileno())
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stderr.fileno())  # a main thread that fails with the others still prints its traceback
            time.sleep(0.1)  # what it has begun to write arrives
            os.write(spoken, f"{line}\n".encode())
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(status)


def _say(line: str, stream: TextIO) -> None:
    """Prints a line; a reader who is gone keeps nobody from ending."""
    with contextlib.suppress(Exception):
        print(line, file=stream, flush=True)
