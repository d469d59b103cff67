"""The hub of a run of several processes: a thread of process 0 to which every process is connected. Messages are lines of JSON.

The hub waits until all have joined, compares how they were started, broadcasts the error that ends the run, and notices at once
when a process ends. JAX's coordination service cannot do this (jax 0.10 and 0.12): it notices a killed process only by missing
heartbeats, and a failure aborts all processes from C++, without the cause and without those that never joined.
"""

import contextlib
import ctypes
import hmac
import json
import math
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from hybrid_attn.files import object_of

# Seconds without a message after which a process is given up. Longer than the half minute for which a live migration or memory
# pressure may stop a virtual machine; all other processes wait that long.
SILENCE = 60
PINGS = 6  # pings that a process sends in that time
# Seconds that the hub waits for the cause: a killed process breaks collectives of the others, whose errors may arrive first.
CAUSE_DELAY = 0.5
EXIT_TIMEOUT = 2  # seconds that process 0 waits for the others to end after an error
JOIN_MESSAGE_TIMEOUT = 5  # seconds after which a connection without a join message is closed
MAX_PENDING = 64  # connections without a join message at a time, besides those of the expected processes
MAX_JOIN_BYTES, MAX_MESSAGE_BYTES = 1000, 2**20
MAX_ERROR_LENGTH = 10_000  # characters of an error
GONE = " ended without a message: look at its log and at its machine's memory (out-of-memory kill)"
SILENT = " has sent nothing for {:.0f} s: it is stopped, or its machine or the network is gone"


class Link:
    """One end of a connection that carries messages: JSON objects of at most `max_bytes` bytes, a line each."""

    def __init__(self, connection: socket.socket, max_bytes: int = MAX_MESSAGE_BYTES):
        self.connection, self.max_bytes = connection, max_bytes
        self.number: int | None = None  # of the process at the other end, once it has joined
        self.opened = self.last_received = time.monotonic()
        self._line, self._sending = b"", threading.RLock()  # reentrant: a signal handler sends, too

    def send(self, **message) -> None:
        """Sends a message; a broken connection is noticed by the thread that receives from it."""
        with self._sending, contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict]:
        """The messages that have arrived completely; OSError if the connection is closed, ValueError for an invalid message."""
        try:
            received = self.connection.recv(2**16)
        except BlockingIOError:
            return []
        if not received:
            raise ConnectionError("the other end has closed the connection")
        self.last_received = time.monotonic()
        *lines, self._line = (self._line + received).split(b"\n")
        if max(map(len, (*lines, self._line))) > self.max_bytes:
            raise ValueError(f"a line of more than {self.max_bytes} bytes")
        return [_message(line) for line in lines]


class Heartbeat:
    """Sends pings in time, and says for how many seconds each of the links has been silent."""

    def __init__(self, links: Sequence[Link], silence: float):
        self.pause = silence / PINGS
        self.ping = self.awake = time.monotonic()
        self.since = dict.fromkeys(links, self.awake)

    def select(self, selector: selectors.BaseSelector, send: Callable, deadline: float = math.inf) -> list:
        """Sends a ping if one is due; waits for something to read, the next ping or the deadline. Returns what can be read."""
        now = time.monotonic()
        if now >= self.ping:
            self.ping = now + self.pause
            send(ping=True)
        return selector.select(max(min(self.ping, deadline) - now, 0))

    def silence(self, link: Link) -> float:
        """Seconds since the last message; after a pause of this process itself, seconds since the end of that pause."""
        now = time.monotonic()
        if now - self.awake > 2 * self.pause:
            self.since = dict.fromkeys(self.since, now)
        self.awake = now
        return now - max(link.last_received, self.since[link])


class Hub(threading.Thread):
    """The thread of process 0 to which all connect, with its `token`. Its error has a code: 2 for a wrong input, else 1."""

    def __init__(self, host: str, port: int, num_processes: int, timeout: float, silence: float = SILENCE, token: str = ""):
        super().__init__(daemon=True)
        self.num_processes, self.timeout, self.silence, self.token = num_processes, timeout, silence, token
        self.links: dict[int, Link] = {}
        self.last_rejection = ""  # address and reason
        self.identities: dict[int, dict[str, str]] = {}  # of each process: fields that must be the same in all
        self.done: set[int] = set()
        self.lost: dict[int, str] = {}
        self.failed: dict[int, tuple[str, int]] = {}
        self.reached_steps: dict[int, int] | None = None  # that each process has reached, once a stop is requested
        self.stop_agreed = False
        self.saved: set[int] = set()
        self.server = listen(host, port)
        self.server.setblocking(False)

    def run(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                error, joined = self.wait_for_all(selector), set(self.links.values())
                for key in [*selector.get_map().values()]:
                    if key.data not in joined:
                        selector.unregister(key.fileobj)
                        key.fileobj.close()
                if error is None:
                    self.broadcast(go=True)
                    error = self.serve(selector)
        except Exception as cause:  # if this thread ended silently, the others would wait forever
            error = f"process 0: {type(cause).__name__} in its hub: {cause}", 1
        if error is None:
            self.broadcast(over=True)
        else:
            self.broadcast(error=error[0][:MAX_ERROR_LENGTH], code=error[1])

    def wait_for_all(self, selector: selectors.BaseSelector) -> tuple[str, int] | None:
        """Waits until every process has joined; returns an error and its exit code if the run cannot begin."""
        until = time.monotonic() + self.timeout
        selector.register(self.server, selectors.EVENT_READ)
        while len(self.links) < self.num_processes:
            if time.monotonic() >= until:
                return self.missing_processes(), 1
            for key, _ in selector.select(min(until - time.monotonic(), 1)):
                if key.fileobj is self.server:
                    self.accept(selector)
                elif error := self.admit(key.data, selector):
                    return error, 2
            links = [key.data for key in selector.get_map().values() if key.fileobj is not self.server]  # the oldest first
            pending = [link for link in links if link.number is None]
            late = sum(time.monotonic() - link.opened > JOIN_MESSAGE_TIMEOUT for link in pending)
            for link in pending[: max(late, len(pending) - MAX_PENDING - self.num_processes)]:
                self.reject(link, selector, "sent no join message")
        return None

    def accept(self, selector: selectors.BaseSelector) -> None:
        try:
            connection, _ = self.server.accept()
        except OSError:  # the connection is closed again, or this process has no file descriptor left
            time.sleep(0.01)
            return
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ, Link(connection, MAX_JOIN_BYTES))

    def admit(self, link: Link, selector: selectors.BaseSelector) -> str | None:
        """Reads a join message and admits the process; returns an error if the run cannot begin."""
        try:
            messages = link.receive()
        except (OSError, ValueError):
            messages = None
        match messages:
            case []:
                return None
            case [{"join": int(number), "of": int(count), "token": str(token)}] if link.number is None:
                pass
            case _:
                return self.reject(link, selector, "disconnected or sent an invalid message")
        if not hmac.compare_digest(*(text.encode("utf-8", "surrogatepass") for text in (token, self.token))):
            reason = "the HYBRID_RUN_TOKEN in its environment is not that of process 0"
            link.send(error=f"process {number}: {reason}; it belongs to another run, or give all the same token", code=2)
            return self.reject(link, selector, f"called itself process {number}, but {reason}")
        if count != self.num_processes:
            error = f"process {number} expects {count} processes and process 0 {self.num_processes}; give all the same number"
        elif number in self.links:
            error = f"two processes have --process_id={number}; give each its own --process_id"
        elif isinstance(number, bool) or not 0 <= number < count:
            return self.reject(link, selector, f"called itself process {number}")
        else:
            link.number, link.max_bytes = number, MAX_MESSAGE_BYTES
            self.links[number] = link
            return None
        link.send(error=error, code=2)
        return error

    def reject(self, link: Link, selector: selectors.BaseSelector, reason: str) -> None:
        """Closes a connection; a process that had joined may join again."""
        with contextlib.suppress(OSError):
            self.last_rejection = f"{link.connection.getpeername()[0]} {reason}"
        selector.unregister(link.connection)
        link.connection.close()
        self.links = {number: other for number, other in self.links.items() if other is not link}

    def missing_processes(self) -> str:
        absent = _processes([number for number in range(self.num_processes) if number not in self.links])
        came = f"{len(self.links)} of {self.num_processes} came within {self.timeout:g} s"
        cure = "look at the logs of the missing ones, or give them more time with --join_timeout"
        rejection = f"; the last rejected connection: {self.last_rejection}" if self.last_rejection else ""
        return f"{absent} never joined: {came}; {cure}{rejection}"

    def serve(self, selector: selectors.BaseSelector) -> tuple[str, int] | None:
        """Handles messages until every process is done; returns the first error and its exit code, if there is one."""
        heartbeat, deadline = Heartbeat(tuple(self.links.values()), self.silence), math.inf
        while len(self.done) < self.num_processes:
            for key, _ in heartbeat.select(selector, self.broadcast, deadline):
                self.read_from(key.data)
                if key.data.number in self.done | self.lost.keys() | self.failed.keys():
                    selector.unregister(key.fileobj)
            self.notice_silence(heartbeat, self.silence)
            if deadline == math.inf and (self.lost or self.failed):
                delay_aborts()
                deadline = time.monotonic() + CAUSE_DELAY
            if time.monotonic() >= deadline:
                return self.first_error(heartbeat)
            if len(self.identities) == self.num_processes:
                different, self.identities = differences(self.identities), {}
                if different:
                    return f"the processes were started differently: {'; '.join(different)}", 2
                self.broadcast(same=True)
        return None

    def read_from(self, link: Link) -> None:
        try:
            for message in link.receive():
                self.handle(link.number, message)
        except OSError:
            self.lost[link.number] = GONE
        except ValueError as error:
            self.failed[link.number] = f": it sent an invalid message: {error}", 1

    def notice_silence(self, heartbeat: Heartbeat, limit: float) -> None:
        for number in self.links.keys() - self.done - self.lost.keys() - self.failed.keys():
            silence = heartbeat.silence(self.links[number])
            if silence > limit:
                self.lost[number] = SILENT.format(silence)

    def first_error(self, heartbeat: Heartbeat) -> tuple[str, int]:
        # A collective may fail before a stopped process has been silent for the full time.
        self.notice_silence(heartbeat, 2.5 * heartbeat.pause)
        for number, text in self.lost.items():
            return f"process {number}{text}", 1
        number, (text, status) = next(iter(self.failed.items()))
        return f"process {number}{text}", 2 if status == 2 else 1

    def handle(self, number: int, message: Mapping) -> None:
        """Handles a message of a process; ValueError if it is not one that `Peers` sends."""
        match message:
            case {"ping": True}:
                return
            case {"failed": str(text), "status": int(status)}:
                self.failed.setdefault(number, (f": {text}", status))
            case {"run": dict(run)} if all(isinstance(value, str) for value in run.values()):
                self.identities[number] = run
            case {"done": True}:
                self.done.add(number)
            case {"saved": True}:
                self.saved.add(number)
            case {"stop": True}:
                if self.reached_steps is None:
                    self.reached_steps = {}
                    self.broadcast(agree=True)
            case {"at": int(step)} if self.reached_steps is not None and -1 <= step < 2**53:
                self.reached_steps[number] = step
            case _:
                raise ValueError(json.dumps(message)[:100])
        reached = self.reached_steps
        if not self.stop_agreed and reached is not None and reached.keys() | self.done == self.links.keys():
            self.stop_agreed = True
            self.broadcast(stop_at=max(reached.values(), default=0) + 1)
        if self.stop_agreed and self.saved == self.links.keys():
            self.saved = set()
            self.broadcast(leave=True)

    def broadcast(self, **message) -> None:
        """Sends a message to all, to process 0 last: the hub ends with it, and JAX's service, which then aborts the others."""
        others = [link for number, link in self.links.items() if number]
        for link in others:
            link.send(**message)
        until = time.monotonic() + EXIT_TIMEOUT
        for link in others if "error" in message else ():
            with contextlib.suppress(OSError):
                left = True  # until the process has closed its end
                while left and time.monotonic() < until:
                    link.connection.settimeout(until - time.monotonic())
                    left = link.connection.recv(2**16)
        if 0 in self.links:
            self.links[0].send(**message)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at `port` of `host`, of all addresses where `host` is empty; OSError names the port."""
    try:
        if ":" in host or (not host and socket.has_dualstack_ipv6()):
            return socket.create_server((host, port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=not host)
        return socket.create_server((host, port), backlog=1024)
    except OSError as cause:
        raise OSError(f"the coordinator cannot listen at port {port}: {cause.strerror}; name another port") from cause


def delay_aborts() -> None:
    """Delays an abort of this process by six seconds, in which the cause can be printed.

    JAX's client aborts the process from C++ as soon as process 0 is gone, and its callback for that case raises std::bad_cast.
    The handler of a signal is called with its number, which is six here; the handler is the C library's `sleep`.
    """
    libc = ctypes.CDLL(None)
    libc.signal(int(signal.SIGABRT), libc.sleep)


def differences(identities: Mapping[int, Mapping[str, str]]) -> list[str]:
    """For each field in which the processes differ, which of them have which value; at most eight fields."""
    lines, ordered = [], sorted(identities)
    for field in dict.fromkeys(field for number in ordered for field in identities[number]):
        numbers: dict[str, list[int]] = {}
        for number in ordered:
            numbers.setdefault(identities[number].get(field, "nothing"), []).append(number)
        if len(numbers) > 1:
            parts = [f"{_processes(n)} {'have' if len(n) > 1 else 'has'} {value[:200]}" for value, n in numbers.items()]
            lines.append(f"{field}: {', '.join(reversed(parts[:8]))}")
    return lines if len(lines) <= 8 else [*lines[:8], f"and {len(lines) - 8} more fields"]


def _processes(numbers: list[int]) -> str:
    """The numbers of processes in words: the first eight, and how many more there are."""
    more = [f"{len(numbers) - 8} more"] if len(numbers) > 8 else []
    *first, last = [*map(str, numbers[:8]), *more]
    return f"processes {', '.join(first)} and {last}" if first else f"process {last}"


def _message(line: bytes) -> dict:
    try:
        return object_of(line, "a message")
    except ValueError as cause:
        raise ValueError(repr(line[:100])) from cause
