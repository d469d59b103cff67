"""The hub of a run of several processes: a thread of process 0 that all are connected to, with a JSON object a line.

It waits until all have joined, compares what they were started with, passes on what ends the run, and notices at once when a
process is gone. jax's own coordination service cannot do this (jax 0.10 and 0.12): it notices a killed process only by the
heartbeats that it misses, and whatever goes wrong aborts every process from C++, without the cause or who never joined.
"""

import contextlib
import ctypes
import hmac
import json
import selectors
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence

# Seconds. Longer than the half minute for which a cloud moves a virtual machine, or memory pressure holds one up; beyond that
# every second is one in which all the others wait in vain.
SILENCE = 60
PINGS = 6  # that a process sends in that time
# A process that is killed breaks the collectives of the others: what they report is not the cause, which arrives with it.
CAUSE_COMES_WITHIN = 0.5
OTHERS_END_WITHIN = 2  # seconds for which process 0 waits for them, once they know why
HELLO_WITHIN = 5  # seconds after which a connection that has not said who it is makes room for others
MOST_STRANGERS = 64  # of those at a time, besides the processes that are expected
LONGEST_HELLO, LONGEST_LINE = 1000, 2**20  # bytes
LONGEST_TEXT = 10_000  # characters of an error
GONE = " ended without a message: look at its log and at its machine's memory (out-of-memory kill)"
SILENT = " has said nothing for {:.0f} s: it is stopped, or its machine or the network is gone"
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Link:
    """One end of a connection that carries messages: JSON objects of at most `longest` bytes, a line each."""

    def __init__(self, connection: socket.socket, longest: int = LONGEST_LINE):
        self.connection, self.longest = connection, longest
        self.number: int | None = None  # of the process at the other end, once it has joined
        self.begun = self.heard = time.monotonic()
        self._line, self._sending = bytearray(), threading.RLock()  # reentrant: a signal handler sends, too

    def send(self, **message) -> None:
        """Whoever is gone, or does not read, is noticed by whoever reads from it."""
        with self._sending, contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict]:
        """The messages that have come whole; OSError if the other end is gone, ValueError if one is no message."""
        try:
            received = self.connection.recv(2**16)
        except BlockingIOError:
            return []
        if not received:
            raise ConnectionError("the other end has closed the connection")
        self.heard = time.monotonic()
        self._line += received
        if b"\n" in received:
            *lines, rest = self._line.split(b"\n")
            self._line = rest
        else:
            lines = []
        if max(map(len, (*lines, self._line))) > self.longest:
            raise ValueError(f"a line of more than {self.longest} bytes")
        return [_message(line) for line in lines]


class Watch:
    """Says when a process is to send a ping, and for how many seconds it has heard nothing through its links."""

    def __init__(self, links: Sequence[Link], silence: float):
        self.pause = silence / PINGS
        self.ping = self.awake = time.monotonic()
        self.since = dict.fromkeys(links, self.awake)

    def ping_is_due(self) -> bool:
        due = time.monotonic() >= self.ping
        if due:
            self.ping = time.monotonic() + self.pause
        return due

    def until_ping(self) -> float:
        return max(self.ping - time.monotonic(), 0)

    def silence(self, link: Link) -> float:
        """Not counting what came before this process was stopped itself: what the others said meanwhile is not yet read."""
        now = time.monotonic()
        if now - self.awake > 2 * self.pause:
            self.since = dict.fromkeys(self.since, now)
        self.awake = now
        return now - max(link.heard, self.since[link])


class Hub(threading.Thread):
    """The thread of process 0 that all processes are connected to; with a `token`, only those that know it can join.

    The error that ends the run has a code: 2 if its cause is a wrong input, else 1.
    """

    def __init__(self, host: str, port: int, num_processes: int, timeout: float, silence: float = SILENCE, token: str = ""):
        super().__init__(daemon=True)
        self.num_processes, self.timeout, self.silence, self.token = num_processes, timeout, silence, token
        self.links: dict[int, Link] = {}
        self.turned_away = ""  # why, of the last connection
        self.runs: dict[int, dict[str, str]] = {}  # what each was started with
        self.done: set[int] = set()
        self.lost: dict[int, str] = {}
        self.failed: dict[int, tuple[str, int]] = {}
        self.steps: dict[int, int] | None = None  # that each has reached when it was asked where to stop
        self.agreed = False
        self.saved: set[int] = set()
        self.server = listen(host, port)
        self.server.setblocking(False)

    def run(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                error = self.call_the_roll(selector)
                joined = {link.connection for link in self.links.values()}
                for key in selector.get_map().values():
                    if key.fileobj not in joined:
                        key.fileobj.close()
            if error is None:
                self.tell(go=True)
                error = self.serve()
        except Exception as cause:  # a thread that ends in silence would leave the others without a watch
            error = f"process 0: {type(cause).__name__} in its hub: {cause}", 1
        if error is None:
            self.tell(over=True)
        else:
            self.tell(error=error[0][:LONGEST_TEXT], code=error[1])

    def call_the_roll(self, selector: selectors.BaseSelector) -> tuple[str, int] | None:
        """Waits until every process has joined; if the run cannot begin, why and the exit code."""
        until, strangers = time.monotonic() + self.timeout, []  # the oldest first
        selector.register(self.server, selectors.EVENT_READ)
        while len(self.links) < self.num_processes:
            now = time.monotonic()
            if now >= until:
                return self.missing(), 1
            for key, _ in selector.select(min(until - now, 1)):
                if key.fileobj is not self.server:
                    error = self.meet(key.data, selector)
                    if error:
                        return error, 2
                elif (link := self.accept()) is not None:
                    selector.register(link.connection, selectors.EVENT_READ, link)
                    strangers.append(link)
            strangers = [link for link in strangers if link.number is None and link.connection.fileno() >= 0]
            most = MOST_STRANGERS + self.num_processes
            late = sum(time.monotonic() - link.begun > HELLO_WITHIN for link in strangers)
            for link in strangers[: max(late, len(strangers) - most)]:
                self.turn_away(link, selector, "did not say who it is")
        return None

    def accept(self) -> Link | None:
        try:
            connection, _ = self.server.accept()
        except OSError:  # it has gone again, or this process has as many files open as it may
            time.sleep(0.01)
            return None
        connection.setblocking(False)
        return Link(connection, LONGEST_HELLO)

    def meet(self, link: Link, selector: selectors.BaseSelector) -> str | None:
        """Reads who is at the other end, and lets it join; why the run cannot begin, if that shows it."""
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
                return self.turn_away(link, selector, "went away or said what no process of a run says")
        if not hmac.compare_digest(*(text.encode("utf-8", "surrogatepass") for text in (token, self.token))):
            why = "the HYBRID_RUN_TOKEN in its environment is not that of process 0"
            link.send(error=f"process {number}: {why}; it belongs to another run, or give all the same", code=2)
            return self.turn_away(link, selector, f"called itself process {number}, but {why}")
        if count != self.num_processes:
            error = f"process {number} counts {count} processes and process 0 counts {self.num_processes}; say the same to all"
        elif number in self.links:
            error = f"two processes say that they are process {number}; give each its own --process_id"
        elif isinstance(number, bool) or not 0 <= number < count:
            return self.turn_away(link, selector, f"called itself process {number}")
        else:
            link.number, link.longest = number, LONGEST_LINE
            self.links[number] = link
            return None
        link.send(error=error, code=2)
        return error

    def turn_away(self, link: Link, selector: selectors.BaseSelector, why: str) -> None:
        """Closes a connection; a process that had joined may do so again."""
        with contextlib.suppress(OSError):
            self.turned_away = f"{link.connection.getpeername()[0]} {why}"
        selector.unregister(link.connection)
        link.connection.close()
        self.links = {number: other for number, other in self.links.items() if other is not link}

    def missing(self) -> str:
        gone = [number for number in range(self.num_processes) if number not in self.links]
        away = f"; the last connection that was turned away: {self.turned_away}" if self.turned_away else ""
        return (
            f"{_processes(gone)} never joined: {len(self.links)} of {self.num_processes} came within {self.timeout:g} s; "
            f"look at what the missing said when they started, or give them more time with --join_timeout{away}"
        )

    def serve(self) -> tuple[str, int] | None:
        """Hands messages on until every process is done; the first error and its code, if there is one."""
        watch, told = Watch(tuple(self.links.values()), self.silence), None
        with selectors.DefaultSelector() as selector:
            for link in self.links.values():
                selector.register(link.connection, selectors.EVENT_READ, link)
            while len(self.done) < self.num_processes:
                if watch.ping_is_due():
                    self.tell(ping=True)
                wait = watch.until_ping() if told is None else min(watch.until_ping(), max(told - time.monotonic(), 0))
                for key, _ in selector.select(wait):
                    self.listen_to(key.data)
                    if key.data.number in self.done | self.lost.keys() | self.failed.keys():
                        selector.unregister(key.fileobj)
                self.notice_silence(watch, self.silence)
                if told is None and (self.lost or self.failed):
                    hold_aborts()
                    told = time.monotonic() + CAUSE_COMES_WITHIN
                if told is not None and time.monotonic() >= told:
                    return self.first_error(watch)
                if len(self.runs) == self.num_processes:
                    different, self.runs = differences(self.runs), {}
                    if different:
                        return f"the processes were started differently: {'; '.join(different)}", 2
                    self.tell(same=True)
        return None

    def listen_to(self, link: Link) -> None:
        try:
            for message in link.receive():
                self.take(link.number, message)
        except OSError:
            self.lost[link.number] = GONE
        except ValueError as error:
            self.failed[link.number] = f": it sent what no process of a run sends: {error}", 1

    def notice_silence(self, watch: Watch, longest: float) -> None:
        for number in self.links.keys() - self.done - self.lost.keys() - self.failed.keys():
            silence = watch.silence(self.links[number])
            if silence > longest:
                self.lost[number] = SILENT.format(silence)

    def first_error(self, watch: Watch) -> tuple[str, int]:
        self.notice_silence(watch, 2.5 * watch.pause)  # a collective with a stopped process may have given up before
        for number, text in self.lost.items():
            return f"process {number}{text}", 1
        number, (text, status) = next(iter(self.failed.items()))
        return f"process {number}{text}", 2 if status == 2 else 1

    def take(self, number: int, message: Mapping) -> None:
        """ValueError if it is not one of the messages that `Peers` sends."""
        match message:
            case {"ping": True}:
                return
            case {"failed": str(text), "status": int(status)}:
                self.failed.setdefault(number, (f": {text}", status))
            case {"run": dict(run)} if all(isinstance(value, str) for value in run.values()):
                self.runs[number] = run
            case {"done": True}:
                self.done.add(number)
            case {"saved": True}:
                self.saved.add(number)
            case {"stop": True}:
                if self.steps is None:
                    self.steps = {}
                    self.tell(agree=True)
            case {"at": int(step)} if self.steps is not None and -1 <= step < 2**53:
                self.steps[number] = step
            case _:
                raise ValueError(json.dumps(message)[:100])
        if not self.agreed and self.steps is not None and self.steps.keys() | self.done == self.links.keys():
            self.agreed = True
            self.tell(stop_at=max(self.steps.values(), default=0) + 1)
        if self.agreed and self.saved == self.links.keys():
            self.saved = set()
            self.tell(leave=True)

    def tell(self, **message) -> None:
        """Process 0 last: it takes this hub with it when it ends, and jax's service, which aborts whoever outlives it."""
        others = [link for number, link in self.links.items() if number]
        for link in others:
            link.send(**message)
        if "error" in message:
            _wait_until_closed(others, OTHERS_END_WITHIN)
        if 0 in self.links:
            self.links[0].send(**message)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at `port` of `host`, or of all addresses if that is empty; OSError that names the port."""
    try:
        if ":" in host or (not host and socket.has_dualstack_ipv6()):
            return socket.create_server((host, port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=not host)
        return socket.create_server((host, port), backlog=1024)
    except OSError as cause:
        raise OSError(f"the coordinator cannot listen at port {port}: {cause.strerror}; name another port") from cause


def hold_aborts() -> None:
    """Has an abort of this process wait for six seconds, in which the cause can be said.

    jax's client aborts the process from C++ as soon as process 0 is gone; jax offers no other end (its callback for that raises
    std::bad_cast). The number of the signal, six, is the argument of its handler: here the C library's `sleep`.
    """
    libc = ctypes.CDLL(None)
    libc.signal(int(signal.SIGABRT), libc.sleep)


def differences(runs: Mapping[int, Mapping[str, str]]) -> list[str]:
    """For each field in which the runs of the processes differ, who has what; at most eight fields."""
    fields = list(dict.fromkeys(field for number in sorted(runs) for field in runs[number]))
    lines = []
    for field in fields:
        numbers: dict[str, list[int]] = {}
        for number in sorted(runs):
            numbers.setdefault(runs[number].get(field, "nothing"), []).append(number)
        if len(numbers) > 1:
            parts = [f"{_processes(n)} {'have' if len(n) > 1 else 'has'} {value[:200]}" for value, n in numbers.items()]
            lines.append(f"{field}: {', '.join(reversed(parts[:8]))}")
    return lines if len(lines) <= 8 else [*lines[:8], f"and {len(lines) - 8} more fields"]


def _processes(numbers: list[int]) -> str:
    """The first eight, and how many there are besides."""
    rest = [f"{len(numbers) - 8} more"] if len(numbers) > 8 else []
    *first, last = [*map(str, numbers[:8]), *rest]
    return f"processes {', '.join(first)} and {last}" if first else f"process {last}"


def _message(line: bytes) -> dict:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise ValueError(repr(bytes(line[:100])))
    return message


def _wait_until_closed(links: list[Link], seconds: float) -> None:
    until = time.monotonic() + seconds
    for link in links:
        with contextlib.suppress(OSError):
            left = True
            while left and time.monotonic() < until:
                link.connection.settimeout(until - time.monotonic())
                left = link.connection.recv(2**16)
