"""Several processes that train as one: how they find each other, stop after the same step and end together.

Each keeps a connection to the hub, a thread of process 0, at the coordinator's address; jax's own service listens at the
port after it. The hub calls the roll, passes on what ends a run, and sees at once when a process is gone. A machine that
vanishes without a word to the network is noticed by its silence, within `SILENCE` seconds.
"""

import atexit
import contextlib
import json
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

# Seconds. Longer than the half minute for which a cloud moves a virtual machine, or memory pressure holds one up; beyond that
# every second is one in which all the others wait in vain.
SILENCE = 60
# A process that is killed breaks the collectives of the others: what they report is not the cause, which arrives with it.
CAUSE_COMES_WITHIN = 0.5
GONE = " ended without a word: look at its log, and for the memory that its machine ran out of"
SPEAKING = threading.Lock()
LOOPBACK = ("localhost", "127.0.0.1")


class Hub(threading.Thread):
    """The thread of process 0 that all processes are connected to."""

    def __init__(self, host: str, port: int, num_processes: int, timeout: float):
        super().__init__(daemon=True)
        self.num_processes, self.timeout = num_processes, timeout
        self.links: dict[int, socket.socket] = {}
        self.done: set[int] = set()
        self.lost: dict[int, str] = {}
        self.failed: dict[int, str] = {}
        self.steps: dict[int, int] | None = None  # that each has reached when it was asked where to stop
        self.agreed = False
        self.saved: set[int] = set()
        try:
            self.server = socket.create_server((host, port), backlog=1024)
        except OSError as cause:
            raise OSError(f"the coordinator cannot listen at port {port}: {cause.strerror}; name another port") from cause

    def run(self) -> None:
        refusal = self.call_the_roll()
        self.server.close()
        self.tell({"error": refusal} if refusal else {"go": True})
        if not refusal:
            self.serve()

    def call_the_roll(self) -> str | None:
        """Waits until every process is connected; the reason why the run cannot begin."""
        until = time.monotonic() + self.timeout
        while len(self.links) < self.num_processes:
            self.server.settimeout(max(until - time.monotonic(), 0.001))
            try:
                link, _ = self.server.accept()
            except TimeoutError:
                return self.missing()
            link.settimeout(5)  # a stranger to this port says nothing that can be read
            try:
                hello = json.loads(link.makefile("rb").readline(1000))
                number, of = hello["join"], hello["of"]
            except (OSError, ValueError, TypeError, KeyError):
                link.close()
                continue
            link.settimeout(None)
            twice = number in self.links
            self.links[len(self.links) + self.num_processes if twice else number] = link  # so that it is told, too
            if twice:
                return f"two processes say that they are process {number}; give each its own --process_id"
            if of != self.num_processes:
                return f"process {number} counts {of} processes and process 0 counts {self.num_processes}; say the same to all"
        return None

    def missing(self) -> str:
        gone = [number for number in range(self.num_processes) if number not in self.links]
        return (
            f"process{'es' if len(gone) > 1 else ''} {_some(gone)} never joined: {len(self.links)} of {self.num_processes} "
            f"came within {self.timeout:g} s; look at what the missing said when they started, or give them more time with "
            "--join_timeout"
        )

    def serve(self) -> None:
        """Hands messages on until every process is done, or one has failed and all have been told."""
        selector, pieces, told = selectors.DefaultSelector(), dict.fromkeys(self.links, b""), None
        for number, link in self.links.items():
            _notice_silence(link)
            selector.register(link, selectors.EVENT_READ, number)
        while len(self.done) < self.num_processes:
            for key, _ in selector.select(None if told is None else max(told - time.monotonic(), 0)):
                number, received = key.data, _receive(key.fileobj)
                if not received:
                    self.lost[number] = GONE
                *lines, pieces[number] = (pieces[number] + received).split(b"\n")
                for line in lines:
                    self.take(number, json.loads(line))
                if number in self.lost or number in self.done:
                    selector.unregister(key.fileobj)
            if told is None and (self.lost or self.failed):
                told = time.monotonic() + CAUSE_COMES_WITHIN
            if told is not None and time.monotonic() >= told:
                break
        else:
            return
        number, text = next(iter((self.lost or self.failed).items()))
        self.tell({"error": f"process {number}{text}"})

    def take(self, number: int, message: Mapping) -> None:
        if "failed" in message:
            self.failed[number] = f": {message['failed']}"
        elif "done" in message:
            self.done.add(number)
        elif "saved" in message:
            self.saved.add(number)
        elif "stop" in message and self.steps is None:
            self.steps = {}
            self.tell({"agree": True})
        elif "at" in message:
            self.steps[number] = message["at"]
        if not self.agreed and self.steps is not None and self.steps.keys() | self.done == self.links.keys():
            self.agreed = True
            self.tell({"stop_at": max(self.steps.values(), default=0) + 1})
        if self.agreed and self.saved == self.links.keys():
            self.saved = set()
            self.tell({"leave": True})

    def tell(self, message: Mapping) -> None:
        """Process 0 last: it takes this hub with it when it ends, and jax's service, which aborts whoever outlives it."""
        others = [link for number, link in self.links.items() if number]
        for link in others:
            _send(link, message)
        if "error" in message:
            _wait_until_closed(others, 2)
        if 0 in self.links:
            _send(self.links[0], message)


class Peers:
    """What a process shares with the others of its run: where all stop, and the error that ends all."""

    def __init__(self, number: int, link: socket.socket, hub: Hub | None):
        self.number, self._link, self._hub = number, link, hub
        self._step, self._stop_at, self._last_words, self._status = -1, None, None, 1
        self._agreeing = threading.Lock()  # held while the others say which steps they have reached
        threading.Thread(target=self._listen, daemon=True).start()

    def ask_to_stop(self) -> None:
        """All processes will stop after the same step, which comes soon; a signal handler may call this."""
        _send(self._link, {"stop": True})

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
        _send(self._link, {"saved": True})

    def fail(self, text: str, status: int, details: str = "") -> None:
        """Ends this process with `status`, the others with 1; each says the first error, after this one has said `details`."""
        self._status = status
        if details:
            with SPEAKING:
                _say(details, sys.stderr)
        _send(self._link, {"failed": text})
        time.sleep(10)  # `_listen` ends this process before that, when the others know
        _end(f"error: {text}", status)

    def close(self) -> None:
        """Says that this process has done its part; process 0 waits for the others."""
        _send(self._link, {"done": True})
        if self._hub:
            self._hub.join(10)

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            for line in self._link.makefile("rb"):
                message = json.loads(line)
                if "error" in message:
                    _end(f"error: {message['error']}", self._status)
                elif "agree" in message:
                    self._agreeing.acquire()  # the main thread waits at its next step
                    _send(self._link, {"at": self._step})
                elif "stop_at" in message:
                    self._stop_at = message["stop_at"]
                    self._agreeing.release()
                elif "leave" in message:
                    self._leave()
        if self._hub is None:
            _end(f"error: process 0{GONE}", 1)

    def _leave(self) -> None:
        if self.number == 0:
            _say(self._last_words, sys.stdout)
        self.close()
        _end(None, 0)


def start(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None, timeout: float = 300
) -> Peers | None:
    """Joins the processes of this run, before anything touches a device; None, and no network, if it is the only one.

    Who they are says whoever calls, or else the launcher: SLURM, Open MPI, a TPU pod or Kubernetes. ValueError where that
    does not fit together; OSError that names who is missing if not all have come after `timeout` seconds.
    """
    found = launchers.given(coordinator, num_processes, process_id) or launchers.detected(timeout)
    if found is None:
        return None
    address, count, number, device_ids = found
    host, _, port = address.rpartition(":")
    bind = host if host in LOOPBACK else ""  # what all have on this machine, nobody elsewhere shall reach
    hub = Hub(bind, int(port), count, timeout) if number == 0 else None
    if hub:
        hub.start()
    link = _join(host.strip("[]"), int(port), number, count, timeout)
    peers = Peers(number, link, hub)
    atexit.register(peers.close)  # before jax's own, and therefore run after it: nobody is missed who is only done
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from the loop
    _silence_gloo()
    try:
        jax.distributed.initialize(
            f"{host}:{_jax_port(int(port))}",
            num_processes=count,
            process_id=number,
            local_device_ids=device_ids,
            cluster_detection_method="deactivate",
            coordinator_bind_address=f"{bind or '[::]'}:{_jax_port(int(port))}",
            heartbeat_timeout_seconds=SILENCE,
        )
    except Exception as cause:
        peers.fail(f"jax.distributed at port {_jax_port(int(port))} of {host}: {cause}", 1)
    return peers


def _join(host: str, port: int, number: int, count: int, timeout: float) -> socket.socket:
    """A connection to the hub, after everyone has one."""
    until, cause = time.monotonic() + timeout, None
    while time.monotonic() < until:
        try:
            link = socket.create_connection((host, port), timeout=5)
            break
        except OSError as error:
            cause = error
            time.sleep(0.2)
    else:
        raise OSError(
            f"process 0 never joined: nothing answered process {number} at {host}:{port} within {timeout:g} s ({cause}); look "
            "at what it said when it started, or give it more time with --join_timeout"
        )
    _send(link, {"join": number, "of": count})
    link.settimeout(timeout + 30)  # the hub began after this process at the latest when it answered
    with contextlib.suppress(TimeoutError, ConnectionError):
        answer = link.makefile("rb", buffering=0).readline()
        message = json.loads(answer or "{}")
        if "go" in message:
            link.settimeout(None)
            _notice_silence(link)
            return link
        if "error" in message:
            raise OSError(message["error"])
    raise OSError(f"process 0 went away from {host}:{port} before all had joined; look at what it said")


def _jax_port(port: int) -> int:
    return port + 1 if port < 2**16 - 1 else port - 1


def _notice_silence(link: socket.socket) -> None:
    """Has the system break the connection to a machine that has answered nothing for `SILENCE` seconds."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", SILENCE // 3), ("TCP_KEEPINTVL", SILENCE // 6), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):  # macOS has other names
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _send(link: socket.socket, message: Mapping) -> None:
    """A line; whoever is gone is noticed by whoever reads from it."""
    with contextlib.suppress(OSError):
        link.sendall(json.dumps(message).encode() + b"\n")


def _receive(link: socket.socket) -> bytes:
    """What has come; nothing when the other end is gone."""
    try:
        return link.recv(2**16)
    except OSError:
        return b""


def _wait_until_closed(links: list[socket.socket], seconds: float) -> None:
    until = time.monotonic() + seconds
    for link in links:
        with contextlib.suppress(OSError):
            link.settimeout(max(until - time.monotonic(), 0.001))
            while link.recv(2**16):
                pass


def _silence_gloo() -> None:
    """Gives file 1 away, to which gloo writes a line for each group of devices; Python's own output goes on where it went."""
    sys.stdout.flush()
    sys.stdout = open(os.dup(1), "w", encoding=sys.stdout.encoding)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)


def _end(line: str | None, status: int) -> None:
    """Ends the process now, wherever its main thread hangs; `line` is the last on its standard error."""
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


def _some(numbers: list[int]) -> str:
    """The first eight, and how many there are besides."""
    rest = [f"{len(numbers) - 8} more"] if len(numbers) > 8 else []
    *first, last = [*map(str, numbers[:8]), *rest]
    return f"{', '.join(first)} and {last}" if first else last
