import contextlib
import json
import random
import socket
import threading
import time
from pathlib import Path

import pytest
from conftest import tiny

from hybrid_attn import config
from hybrid_attn.parallel import hub, identity, processes

GO, STRANGE = {"go": True}, "it sent an invalid message"


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


class Process:
    """A process of a run as the hub sees it: lines of JSON."""

    def __init__(self, port: int, host: str = "localhost"):
        self.connection = socket.create_connection((host, port), timeout=10)
        self.reader = self.connection.makefile("rb")

    def send(self, line: bytes) -> None:
        with contextlib.suppress(OSError):  # it may have been turned away
            self.connection.sendall(line)

    def say(self, **message) -> None:
        self.send(json.dumps(message).encode() + b"\n")

    def hear(self) -> dict | None:
        """The next message but pings, of which an error is the last; None when the hub has closed the connection."""
        with contextlib.suppress(ConnectionError):
            for line in self.reader:
                if line != b'{"ping": true}\n':
                    if b'"error"' in line:
                        self.end()
                    return json.loads(line)
        return None

    def end(self) -> None:
        self.reader.close()
        self.connection.close()


@pytest.fixture
def hub_of(monkeypatch):
    """Starts hubs, which end with their test at the latest."""
    hubs = []
    monkeypatch.setattr(hub, "CAUSE_DELAY", 0.1)
    monkeypatch.setattr(hub, "EXIT_TIMEOUT", 0.1)

    def start(count: int, host="localhost", timeout=10.0, **options) -> tuple[hub.Hub, int]:
        port = free_port()
        hubs.append(hub.Hub(host, port, count, timeout, **options))
        hubs[-1].start()
        return hubs[-1], port

    yield start
    for started in hubs:
        for link in list(started.links.values()):
            with contextlib.suppress(OSError):
                link.connection.shutdown(socket.SHUT_RDWR)
        started.join(15)
        assert not started.is_alive()


def joined(port: int, numbers, count: int, host: str = "localhost", token: str = "") -> list[Process]:
    """Processes `numbers` of `count`, which have said who they are."""
    started = [Process(port, host) for _ in numbers]
    for process, number in zip(started, numbers, strict=True):
        process.say(join=number, of=count, token=token)
    return started


def hello(join=1, of=2, token="") -> bytes:
    return json.dumps({"join": join, "of": of, "token": token}).encode() + b"\n"


STRANGERS = (
    b"GET / HTTP/1.1\r\n\r\n", b"\n", b"5\n", b"null\n", b"[]\n", b"{}\n", b'"join"\n', b"\xff\xfe\n", b'{"join": 1}\n',
    b"[" * 900 + b"\n", b"x" * 5000, b'{"join": 1, "of": 2, "token": "' + b"y" * 5000 + b'"}\n', b"9" * 900 + b"\n",
    hello(join="1"), hello(join=[1]), hello(join=None), hello(join=1.0), hello(join=True), hello(join=-1), hello(join=2),
    hello(join=10**30), hello(of="2"), hello(of=None), hello(token=3), hello(token=None), hello() + hello(),
    b'{"join": 1, "of": 2, "token": "\\ud800"}\n',
)  # fmt: skip


def test_messages_of_strangers_neither_join_nor_delay_a_run(hub_of):
    roll, port = hub_of(2)
    others = [Process(port) for _ in STRANGERS]
    for other, line in zip(others, STRANGERS, strict=True):
        other.send(line)
    assert all((other.hear() or {"error": ""}).keys() <= {"error", "code"} for other in others)
    assert not roll.links and roll.is_alive()
    process0, process1 = joined(port, (0, 1), 2)
    assert process0.hear() == process1.hear() == GO


def test_silent_slow_and_many_connections_cost_a_run_no_time(hub_of):
    _, port = hub_of(2)
    silent = [Process(port) for _ in range(150)]
    slow, ended = silent.pop(), threading.Event()

    def trickle():
        while not ended.wait(0.05):
            slow.send(b"x")

    thread = threading.Thread(target=trickle)
    thread.start()
    before = time.monotonic()
    process0, process1 = joined(port, (0, 1), 2)
    assert process0.hear() == process1.hear() == GO
    assert time.monotonic() - before < 2
    ended.set()
    thread.join()


def test_a_connection_without_a_join_message_does_not_extend_the_timeout(hub_of):
    _, port = hub_of(2, timeout=0.5)
    (process1,) = joined(port, (1,), 2)
    stranger, before = Process(port), time.monotonic()
    stranger.send(b"x\n")
    silent = Process(port)
    answer = process1.hear()
    assert time.monotonic() - before < 2 and answer["code"] == 1
    assert answer["error"].startswith("process 0 never joined: 1 of 2 came within 0.5 s")
    assert "the last rejected connection: 127.0.0.1 disconnected or sent an invalid message" in answer["error"]
    assert silent.hear() is None


def test_a_process_that_went_away_before_the_others_came_may_join_again(hub_of):
    roll, port = hub_of(2)
    (first,) = joined(port, (1,), 2)
    until = time.monotonic() + 5
    while not roll.links and time.monotonic() < until:
        time.sleep(0.01)
    first.end()
    while roll.links and time.monotonic() < until:
        time.sleep(0.01)
    process1, process0 = joined(port, (1, 0), 2)
    assert process0.hear() == process1.hear() == GO


def test_only_processes_that_know_the_token_join(hub_of):
    roll, port = hub_of(2, token="secret")
    for token in ("", "Secret", "\u00e9"):
        (stranger,) = joined(port, (1,), 2, token=token)
        answer = stranger.hear()
        assert answer["code"] == 2 and "HYBRID_RUN_TOKEN in its environment is not that of process 0" in answer["error"]
    (stranger,) = joined(port, (1,), 7)  # nor does the number of its processes end the run
    assert "HYBRID_RUN_TOKEN" in stranger.hear()["error"]
    process0, process1 = joined(port, (0, 1), 2, token="secret")
    assert process0.hear() == process1.hear() == GO


@pytest.mark.parametrize("seed", range(3))
def test_random_bytes_neither_end_the_hub_nor_hide_the_death_of_a_process(hub_of, seed):
    draw = random.Random(seed)
    samples = [hello(), b'{"at": 3}\n', b'{"stop": true}\n', b'{"failed": "x", "status": 1}\n', b'{"ping": true}\n']

    def noise() -> bytes:
        """Random bytes, or a message of which some were changed, added or cut off; never a whole hello."""
        if draw.random() < 0.3:
            return draw.randbytes(draw.randrange(1, 300))
        line = bytearray(draw.choice(samples))
        for _ in range(draw.randrange(1, 6)):
            line[draw.randrange(len(line))] = draw.randrange(256)
        return bytes(line[: draw.randrange(1, len(line) + 1)]) * draw.randrange(1, 4)

    roll, port = hub_of(3, token="secret")
    for _ in range(100):
        stranger = Process(port)
        stranger.send(noise())
        stranger.end()
    process0, process1, process2 = joined(port, (0, 1, 2), 3, token="secret")
    assert process0.hear() == process1.hear() == process2.hear() == GO
    for _ in range(100):
        process1.send(noise())
    process2.end()
    assert process0.hear() == {"error": f"process 2{processes.GONE}", "code": 1}
    roll.join(10)
    assert not roll.is_alive()


BAD_LINES = (
    b"what\n", b"5\n", b"null\n", b"[]\n", b"{}\n", b'{"at": 3}\n', b'{"at": "x"}\n', b'{"failed": 1, "status": 1}\n',
    b'{"failed": "x"}\n', b'{"run": {"a": 1}}\n', b'{"run": []}\n', b'{"done": 0}\n', b'{"stop": "yes"}\n', b"\xff\n",
    b"[" * 200_000 + b"\n", b"x" * (2**20 + 2**17),
)  # fmt: skip


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:20])
def test_a_line_that_no_process_sends_is_the_failure_of_the_one_that_sent_it(hub_of, line):
    _, port = hub_of(2)
    process0, process1 = joined(port, (0, 1), 2)
    assert process0.hear() == process1.hear() == GO
    process1.send(line)
    answer = process0.hear()
    assert answer["error"].startswith(f"process 1: {STRANGE}: ") and answer["code"] == 1
    assert len(answer["error"]) < 1000


@pytest.mark.parametrize("status, code", [(2, 2), (1, 1), (3, 1), (130, 1)])
def test_the_others_end_with_code_2_if_the_failure_of_one_is_a_wrong_input_and_else_with_1(hub_of, status, code):
    _, port = hub_of(2)
    both = joined(port, (0, 1), 2)
    assert [process.hear() for process in both] == [GO, GO]
    both[1].say(failed="no such file", status=status)
    assert [process.hear() for process in both] == [{"error": "process 1: no such file", "code": code}] * 2


def test_a_silent_process_ends_the_run_and_one_that_pings_does_not(hub_of):
    _, port = hub_of(3, silence=1.5)
    started = joined(port, (0, 1, 2), 3)
    assert [process.hear() for process in started] == [GO] * 3
    before, over = time.monotonic(), threading.Event()

    def ping():
        while not over.wait(0.1):
            started[0].say(ping=True)
            started[2].say(ping=True)

    thread = threading.Thread(target=ping)
    thread.start()
    answers = [process.hear() for process in started]
    waited = time.monotonic() - before
    over.set()
    thread.join()
    assert 1.5 <= waited < 6
    assert answers == [{"error": f"process 1{processes.SILENT.format(1.5)}", "code": 1}] * 3


def test_a_failure_caused_by_a_stopped_process_is_reported_as_its_silence(hub_of):
    _, port = hub_of(2, silence=1)
    process0, process1 = joined(port, (0, 1), 2)
    assert process0.hear() == process1.hear() == GO
    time.sleep(0.5)
    process0.say(failed="a collective timed out", status=1)
    assert process0.hear() == {"error": f"process 1{processes.SILENT.format(1)}", "code": 1}


RUN = {"config.optim.lr": "0.001", "workdir": "/a", "version of jax": "0.10.2"}


def test_processes_that_were_started_alike_go_on(hub_of):
    _, port = hub_of(3)
    started = joined(port, (0, 1, 2), 3)
    assert [process.hear() for process in started] == [GO] * 3
    for process in started:
        process.say(run=RUN)
    assert [process.hear() for process in started] == [{"same": True}] * 3


def test_processes_that_were_started_differently_end_with_the_fields_that_differ(hub_of):
    _, port = hub_of(4)
    started = joined(port, range(4), 4)
    assert [process.hear() for process in started] == [GO] * 4
    runs = RUN, RUN | {"config.optim.lr": "0.003"}, RUN | {"config.optim.lr": "0.003"}, RUN | {"config.x": "1", "workdir": "/b"}
    for process, run in zip(started, runs, strict=True):
        process.say(run=run)
    wanted = (
        "the processes were started differently: config.optim.lr: processes 1 and 2 have 0.003, processes 0 and 3 have 0.001; "
        "workdir: process 3 has /b, processes 0, 1 and 2 have /a; config.x: process 3 has 1, processes 0, 1 and 2 have nothing"
    )
    assert [process.hear() for process in started] == [{"error": wanted, "code": 2}] * 4


def test_the_identity_of_a_run_has_all_keys_of_the_config_the_workdir_and_the_code(tmp_path, monkeypatch):
    values = config.to_dict(tiny())
    many = {"data": {"sources": {"text": {"paths": [f"/data/shard-{i}.txt" for i in range(10**5)]}}}}
    fewer = {"data": {"sources": {"text": {"paths": [f"/data/shard-{i}.txt" for i in range(10**5 - 1)]}}}}
    long, longer = (identity.identity(some, "runs/a", "abc")["config.data.sources.text.paths"] for some in (fewer, many))
    assert long != longer and long.startswith("['/data/shard-0.txt', ") and len(longer) <= 200
    ours = identity.identity(values, "runs/a", "abc")
    assert ours == identity.identity(config.to_dict(tiny()), Path.cwd() / "runs/a", "abc")
    others = config.to_dict(tiny({"optim.lr": 0.5, "model.kinds.L.window": 7}))
    others["stages"][0]["steps"] = 99
    monkeypatch.setattr(identity, "PACKAGE", tmp_path)
    (tmp_path / "edited.py").write_text("x = 1")
    theirs = identity.identity(others, "runs/b", "abd")
    assert {name for name in ours | theirs if ours.get(name) != theirs.get(name)} == {
        "config.optim.lr", "config.model.kinds.L.window", "config.stages[0].steps", "workdir", "revision", "source code",
    }  # fmt: skip
    assert {f"version of {name}" for name in ("python", *identity.LIBRARIES, "tokenizers", "grain")} <= ours.keys()


def test_processes_find_each_other_by_ipv6_and_ipv4(hub_of):
    for host, ways in (("::1", ("::1", "::1")), ("", ("::1", "127.0.0.1"))):
        _, port = hub_of(2, host)
        process0, process1 = *joined(port, (0,), 2, ways[0]), *joined(port, (1,), 2, ways[1])
        assert process0.hear() == process1.hear() == GO


@pytest.mark.parametrize(
    "answer, message",
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n", r"is not process 0 of a run: b'SSH-2\.0-OpenSSH_9\.6\\r'; name another port"),
        (b"x" * 1_200_000, "is not process 0 of a run: a line of more than 1048576 bytes"),
        (b"", "process 0 disconnected from localhost:"),
    ],
    ids=["ssh", "endless", "nothing"],
)
def test_another_program_at_the_coordinator_s_port_is_an_error(answer, message):
    def serve():
        connection, _ = server.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(1000)
            connection.sendall(answer)

    with socket.create_server(("localhost", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(OSError, match=message):
            processes._join(("localhost", server.getsockname()[1]), 1, 2, 10)
        thread.join()


def listener(port: int, address: str = "") -> socket.socket:
    """A server at a port of an IPv6 address, by default at all addresses of both versions; port 0 is any that is free."""
    return socket.create_server((address, port), family=socket.AF_INET6, dualstack_ipv6=not address)


@contextlib.contextmanager
def taken_port(host: str, offset: int):
    """A port P such that another program listens at P + offset; with an offset, nobody listens at P."""
    while True:
        server = listener(0, "::1" if "[" in host else "")
        port = server.getsockname()[1] - offset
        try:
            if offset:
                listener(port).close()
        except OSError:  # a program of this machine has it
            server.close()
            continue
        with server:
            yield port
        return


@pytest.mark.parametrize("host, taken", [("localhost", 0), ("localhost", 1), ("[::1]", 1), ("10.0.0.1", 1)])
def test_a_port_that_another_program_uses_is_named(host, taken):
    with taken_port(host, taken) as port:
        with pytest.raises(OSError, match=f"the coordinator cannot listen at port {port + taken}: Address already in use"):
            processes.start(f"{host}:{port}", 2, 0, timeout=1)
    with socket.create_server(("localhost", port)):  # and nothing is left there
        pass
