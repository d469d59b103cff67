"""The program that chats: what it asks its session for, prints and refuses. The session here knows one reply."""

import functools
import io
import os
import signal
import sys
import types

import conftest
import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from conftest import ONE_LAYER, mesh_of, random_params, tiny

from hybrid_attn import checkpoint, config
from hybrid_attn.infer.engine import EngineOptions, Generated
from hybrid_attn.infer.sampling import GREEDY, Sampling
from hybrid_attn.programs import parse

REPLY = [*b"yes, sir", 257]
USER = "user:\n{}\n\nassistant:\n"


class Session:
    """Replies `reply`, three tokens at a time, and records its calls; `hook` gets the tokens sent so far before each piece."""

    calls, reply, hook = [], REPLY, staticmethod(lambda sent: None)

    def __init__(self, params, config, options):
        Session.options = options

    def generate(self, prompts, max_new_tokens, **options):
        (prompt,), tokens = prompts, Session.reply[:max_new_tokens]
        text = bytes(i for i in prompt if i < 256).decode()
        Session.calls.append((text, max_new_tokens, options["seeds"], options["options"]))
        sent = []
        for at in range(0, len(tokens), 3):
            Session.hook(sent)
            sent += tokens[at : at + 3]
            if options["on_tokens"](0, tokens[at : at + 3]):
                break
        return [Generated(np.array(sent), np.full(len(sent), -0.5))]


@pytest.fixture(scope="module")
def tool():
    session = types.ModuleType("hybrid_attn.infer.session")
    session.Session = Session
    with conftest.tool("chat", **{session.__name__: session}) as module:
        yield module


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    directory, c = tmp_path_factory.mktemp("run"), tiny(ONE_LAYER)
    with jax.set_mesh(mesh_of()):
        checkpoints = checkpoint.Checkpoints(directory / "checkpoints", keep=1, every=1)
        data = {"stage_steps": [2], "stage": {"tokenizer": "bytes"}}
        checkpoints.save(2, {"params": random_params(c.model)}, data, config.to_dict(c))
        checkpoints.close()
    return directory


@pytest.fixture
def run(tool, workdir, capsys, monkeypatch):
    """Runs the program with flags on the bytes of stdin; gives its exit status, its stdout and the lines of its stderr."""

    def call(typed, *arguments):
        Session.calls = []
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
        status = 0
        with flagsaver.flagsaver():
            try:
                tool.main(parse(["chat.py", f"--checkpoint={workdir}", *arguments]))
            except SystemExit as end:
                status = end.code
        out, err = capsys.readouterr()
        return status, out, err.splitlines()

    return call


def test_a_conversation_goes_on_and_tells_how_full_its_context_is(run, workdir):
    status, out, (first, *told) = run(b"hi\n\n how? \n", "--context=99", "--seed=4294967295", "--system=be kind")
    said = "system:\nbe kind\n\n" + USER.format("hi")
    assert [x[:3] for x in Session.calls] == [
        (said, 99 - 1 - len(said), [2**32 - 1]),
        (f"{said}yes, sir\n{USER.format('how?')}", 99 - 2 - len(said) - len("yes, sir\n" + USER.format("how?")), [0]),
    ]
    assert (status, out) == (0, "yes, sir\nyes, sir\n")
    assert first.startswith(f"the checkpoint of step 2 in {workdir}/checkpoints, with a context of 99 tokens (--context)")
    assert told == [f"[{1 + len(said) + 9} of 99 tokens]", "[81 of 99 tokens]"]
    assert Session.options == EngineOptions(chunk=256, slice=4)
    assert Session.calls[0][3].sampling == GREEDY and Session.calls[0][3].stop_tokens == [257]


def test_flags_reach_the_session_and_a_reply_that_is_cut_is_told(run):
    status, out, told = run(b"hi\n", "--temperature=0.5", "--top_p=0.75", "--max_new_tokens=3", "--chunk=64", "--cache=int8")
    assert (status, out, told[1]) == (0, "yes\n", "[25 of 48 tokens; --max_new_tokens cuts the reply]")
    assert Session.options == EngineOptions(chunk=64, cache="int8", slice=4)
    assert Session.calls[0][1] == 3 and Session.calls[0][3].sampling == Sampling(0.5, None, 0.75)
    assert "(seq_len of the checkpoint's stage)" in told[0]
    assert run(b"hi\n", "--context=25")[2][1] == "[25 of 25 tokens; --context cuts the reply]"


def test_commands_are_no_messages_and_the_end_is_one_of_them(run):
    status, out, told = run(b"hi\n/reset\nhi\n/help\n/reset\n/etc?\n/exit\nhi\n")
    assert (status, out) == (0, "yes, sir\n" * 3) and Session.calls[0][0] == Session.calls[1][0]
    assert told[2] == "a new conversation" and told[4].startswith("/reset begins a new conversation, /exit or Ctrl-D ends the")
    assert [x[0] for x in Session.calls[2:]] == [USER.format("/etc?")]


def test_a_reply_ends_before_a_special_token_that_it_spells_and_the_conversation_goes_on(run, monkeypatch):
    monkeypatch.setattr(Session, "reply", [*b"yes<|eos|>no", 257])
    status, out, told = run(b"hi\nand\n", "--context=99")
    assert (status, out) == (0, "yes\nyes\n") and not any("error" in x for x in told)
    assert Session.calls[1][0] == f"{USER.format('hi')}yes\n{USER.format('and')}"


def test_where_no_special_token_ends_a_reply_the_next_turn_of_the_template_does(run, monkeypatch, tmp_path):
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")
    monkeypatch.setattr(Session, "reply", [*b"yes\n[user] no"])
    assert run(b"hi\n", f"--chat_template={tmp_path / 'chat.jinja'}")[:2] == (0, "yes\n")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (b"x" * 30, "the conversation would have 50 of 48 tokens; a larger --context allows more"),
        (b"a<|eos|>", "a message spells '<|eos|>', which is a special token; only the template may write one"),
        (b"\xff", "the message is not UTF-8"),
    ],
)
def test_a_message_that_cannot_be_answered_is_a_line_and_no_part_of_the_conversation(run, typed, said):
    status, out, told = run(typed + b"\nhi\n")
    assert (status, out, told[1]) == (0, "yes, sir\n", f"error: {said}")
    assert [x[0] for x in Session.calls] == [USER.format("hi")]


def test_a_conversation_that_is_full_is_told_to_begin_anew(run):
    told = run(b"hi\n" + b"x" * 30 + b"\n")[2]
    assert told[2].endswith("of 48 tokens; /reset begins a new one, and a larger --context allows more")


def test_ctrl_c_stops_a_reply_which_stays_and_a_second_one_ends_the_program(run, monkeypatch):
    monkeypatch.setattr(os, "_exit", sys.exit)

    def interrupt(times, sent):
        if len(Session.calls) == 1 and len(sent) == 3:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Session, "hook", functools.partial(interrupt, 1))
    status, out, told = run(b"hi\nand\n", "--context=99")
    assert (status, out) == (0, "yes, s\nyes, sir\n") and told[1] == "[28 of 99 tokens]"
    assert Session.calls[1][0] == f"{USER.format('hi')}yes, s\n{USER.format('and')}"
    monkeypatch.setattr(Session, "hook", functools.partial(interrupt, 2))
    status, out, told = run(b"hi\n")
    assert (status, out, told[1:]) == (130, "yes\n", ["error: interrupted"])


def test_ctrl_c_stops_a_reply_of_which_nothing_is_shown_and_ends_the_program_before_the_first_token(run, monkeypatch):
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(Session, "reply", [300] * 9)  # which have no text
    monkeypatch.setattr(Session, "hook", lambda sent: len(sent) == 3 and os.kill(os.getpid(), signal.SIGINT))
    assert run(b"hi\n")[2][1] == "[28 of 48 tokens]"
    monkeypatch.setattr(Session, "hook", lambda sent: os.kill(os.getpid(), signal.SIGINT))
    status, out, told = run(b"hi\n")
    assert (status, out, told[1:]) == (130, "\n", ["error: interrupted"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--chat_template=none"], "--chat_template=none is not a file; name a file with a Jinja template"),
        (["--chat_template=lost.jinja"], "the chat template leaves out message 1, of the role 'user'"),
        (["--chat_template=users.jinja", "--system=?"], "the chat template leaves out message 1, of the role 'system'"),
        (["--system=\udcff"], "--system is not UTF-8"),
        (["--system=<|eos|>"], "a message spells '<|eos|>', which is a special token; only the template may write one"),
        (["--context=9"], "the conversation would have 21 of 9 tokens; a larger --context allows more"),
        (["--step=4"], "checkpoints has no complete checkpoint of step 4; it has 2"),
        (["hi"], "'hi' is no flag"),
    ],
)
def test_what_cannot_be_a_chat_is_a_line(run, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lost.jinja").write_text("Which model is this?")
    (tmp_path / "users.jinja").write_text("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}")
    status, out, told = run(b"", *arguments)
    assert (status, out) == (2, "") and said in told[0] and len(told) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--top_p=0.5"], "top_p=0.5 changes nothing at temperature=0; use temperature=1"),
        (["--stop="], "an empty string is no stop: ['', "),
        (["--chunk=3", "--mesh=context=2"], "chunk=3 does not split over 2 context shards"),
    ],
)
def test_flags_are_checked_before_the_parameters_are_read(run, tool, arguments, said, monkeypatch):
    monkeypatch.setattr(tool.loading, "load", None)
    status, _, told = run(b"", *arguments)
    assert status == 2 and said in told[0]


def test_a_checkpoint_without_a_template_names_the_flag_for_one(run, tool, monkeypatch):
    monkeypatch.setattr(tool.loading, "chat_template", lambda *_: None)
    status, _, told = run(b"")
    assert status == 2 and told[0].endswith("(or, to chat and generate, name one with --chat_template)")
