"""The tool that answers: what it passes to the engine, what it prints and what it refuses. The engine here knows one answer."""

import errno
import json
import os
import sys
import types

import conftest
import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from conftest import mesh_of, random_params, tiny

from hybrid_attn import checkpoint, config, files
from hybrid_attn.infer.cache import Compression
from hybrid_attn.infer.engine import DEFAULT_CHUNK, EngineOptions, Generated, Timing
from hybrid_attn.infer.requests import GenerateOptions
from hybrid_attn.infer.sampling import GREEDY, Sampling
from hybrid_attn.programs import parse

REPLY = "two: né. END after".encode()
TRAINED = config.build_checkpoint_config(config.to_dict(tiny()))


class Engine:
    """Answers every prompt with REPLY, three bytes at a time, and records its arguments; `last` is the newest engine."""

    last = None

    def __init__(self, params, config, options):
        self.params, self.config, self.options, self.mesh = params, config, options, jax.sharding.get_mesh()
        Engine.last = self

    def generate(self, prompts, max_new_tokens, **options):
        self.prompts, self.max_new_tokens, self.arguments = prompts, max_new_tokens, options
        if options["seeds"][0] == 13:
            options["on_tokens"](0, list(REPLY[:3]))
            raise KeyboardInterrupt
        if options["seeds"][0] == 14:
            raise FloatingPointError("prompt 0: the log-probability of token 0 is nan")
        tokens = REPLY[:max_new_tokens]
        for i in range(len(prompts)):
            for at in range(0, len(tokens), 3):
                if options["on_tokens"](i, list(tokens[at : at + 3])):
                    break
        self.timing = Timing(2_000, 60, 0.25, 0.5, 2.0, 9.0, 3 * 2**19)
        return [Generated(np.array(list(tokens)), np.full(len(tokens), -0.5))] * len(prompts)


@pytest.fixture(scope="module")
def tool():
    """The tool's module over the engine above."""
    engine = types.ModuleType("hybrid_attn.infer.engine")
    engine.Engine, engine.Timing, engine.DEFAULT_CHUNK, engine.EngineOptions = Engine, Timing, DEFAULT_CHUNK, EngineOptions
    with conftest.tool("generate", **{engine.__name__: engine}) as module:
        yield module


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    directory, c = tmp_path_factory.mktemp("run"), tiny()
    with jax.set_mesh(mesh_of()):
        checkpoints = checkpoint.Checkpoints(directory / "checkpoints", keep=1, every=1)
        state = {"params": random_params(c.model)}
        checkpoints.save(2, state, {"stage_steps": [2], "stage": {"tokenizer": "bytes"}}, config.to_dict(c))
        checkpoints.close()
    return directory


@pytest.fixture
def run(tool, workdir, capsys):
    """Runs the tool with flags; gives its exit status, its stdout and its stderr."""

    def call(*arguments, directory=workdir):
        status = 0
        with flagsaver.flagsaver():
            try:
                tool.main(parse(["generate.py", f"--checkpoint={directory}", *arguments]))
            except SystemExit as end:
                status = end.code
        out, err = capsys.readouterr()
        return status, out, err

    return call


def test_an_answer_is_streamed_to_its_stop_and_its_speed_is_printed(run):
    status, out, err = run("--prompt=one, é", "--stop=END", "--stop=never", "--max_new_tokens=20")
    assert (status, out) == (0, "two: né. \n")
    assert err.splitlines()[-4:] == [
        "first token  after 0.25 s, besides 9.0 s of compiling",
        "prefill      2,000 tokens in 0.50 s, 4,000 tokens/s",
        "decode       60 tokens in 2.00 s, 30 tokens/s",
        "cache        1.50 MiB",
    ]
    engine = Engine.last
    assert engine.prompts == [[256, *"one, é".encode()]] and engine.max_new_tokens == 20
    assert (engine.config, engine.options, engine.mesh.size) == (TRAINED, EngineOptions(2048, "auto", None), 1)
    arguments = {name: x for name, x in engine.arguments.items() if name != "on_tokens"}
    assert arguments == {"options": GenerateOptions(GREEDY, [257], None), "seeds": [0], "questions": None}


def test_every_flag_reaches_the_engine(run):
    status, *_ = run(
        "--prompt=x", "--question=y?", "--temperature=0.7", "--top_k=5", "--top_p=0.9", "--min_p=0.01", "--seed=4294967295",
        "--chunk=64", "--cache=int8", "--capacity=512",
        "--compress=adakv:cap=96,window=16,floor=0.5,pooling=max", "--nobos", "--step=2",
        "--mesh=tensor=2,fsdp=2",
    )  # fmt: skip
    engine = Engine.last
    assert status == 0 and engine.options == EngineOptions(chunk=64, cache="int8", capacity=512)
    assert {name: size for name, size in engine.mesh.shape.items() if size > 1} == {"tensor": 2, "fsdp": 2}
    assert len(engine.params["embed"].sharding.device_set) == 4
    assert (engine.prompts, engine.arguments["questions"], engine.arguments["seeds"]) == ([[*b"x"]], [[*b"y?"]], [2**32 - 1])
    assert engine.arguments["options"].sampling == Sampling(0.7, 5, 0.9, 0.01)
    assert engine.arguments["options"].compression == Compression("adakv", cap=96, window=16, floor=0.5, pooling="max")


def test_json_lines_are_answered_with_what_they_carry(run, tmp_path):
    lines = [{"prompt": "a", "id": 7}, {"prompt": "東"}]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(json.dumps(x) for x in lines) + "\n\n")
    status, out, _ = run(f"--prompts={source}", "--seed=4294967295", "--stop=END")
    numbers = {"answer": "two: né. ", "tokens": 13, "logprob": -6.5}  # up to the stop's last byte
    assert status == 0 and [json.loads(line) for line in out.splitlines()] == [x | numbers for x in lines]
    assert Engine.last.prompts == [[256, *b"a"], [256, *"東".encode()]] and Engine.last.arguments["seeds"] == [2**32 - 1, 0]
    status, out, _ = run(f"--prompts={source}", "--question=what?", f"--out={target}", "--max_new_tokens=3")
    assert (status, out) == (0, "")
    written = [json.loads(line) for line in target.read_text().splitlines()]
    assert written == [x | {"question": "what?", "answer": "two", "tokens": 3, "logprob": -1.5} for x in lines]
    assert run("--prompt=a", f"--out={target}", "--max_new_tokens=3")[1] == "two\n"
    assert [json.loads(line)["answer"] for line in target.read_text().splitlines()] == ["two"]


def test_lines_may_have_questions_of_their_own(run, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a", "question": "b"}\n{"prompt": "c", "question": "d"}\n')
    assert run(f"--prompts={source}")[0] == 0 and Engine.last.arguments["questions"] == [[*b"b"], [*b"d"]]
    source.write_text('{"prompt": "a", "question": "b"}\n{"prompt": "c"}\n')
    status, _, err = run(f"--prompts={source}")
    assert status == 2 and "some lines have a question and others have none; give --question for those" in err
    assert run(f"--prompts={source}", "--question=e")[0] == 0 and Engine.last.arguments["questions"] == [[*b"b"], [*b"e"]]
    source.write_text('{"prompt": "a", "question": "b"}\n{"messages": [{"role": "user", "content": "hi"}]}\n')
    assert f"others have none; {source}:2 has messages, so answer it from a file of its own" in run(f"--prompts={source}")[2]


def test_messages_are_answered_after_the_template_of_the_checkpoint_beside_prompts(run, tmp_path):
    source, template = tmp_path / "in.jsonl", tmp_path / "chat.jinja"
    talk = [{"role": "user", "content": "hi"}]
    source.write_text(json.dumps({"messages": talk, "id": 7}) + '\n{"prompt": "a"}\n')
    status, out, _ = run(f"--prompts={source}", "--max_new_tokens=3")
    answers = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and answers[0]["messages"] == talk and [x["answer"] for x in answers] == ["two", "two"]
    assert Engine.last.prompts == [[256, *b"user:\nhi\n\nassistant:\n"], [256, *b"a"]]
    template.write_text("{{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}")
    assert run(f"--prompts={source}", f"--chat_template={template}", "--nobos")[0] == 0
    assert Engine.last.prompts == [[*b"hi>"], [*b"a"]]


def test_what_ends_an_answer_does_not_depend_on_the_other_requests(run, tmp_path):
    source, template = tmp_path / "in.jsonl", tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{{ bos_token }}{% endfor %}")
    stops = []
    for more in ("", '{"messages": [{"role": "user", "content": "hi"}]}\n'):
        source.write_text('{"prompt": "a"}\n' + more)
        assert run(f"--prompts={source}", f"--chat_template={template}")[0] == 0
        stops.append(Engine.last.arguments["options"].stop_tokens)
    assert stops == [[256, 257]] * 2


@pytest.mark.parametrize("arguments", [["--stop="], ["--chunk=3", "--mesh=context=2"]])
def test_flags_are_checked_before_the_parameters_are_read(run, tool, arguments, monkeypatch):
    monkeypatch.setattr(tool.loading, "load", None)
    assert run("--prompt=a", *arguments)[0] == 2


def test_ctrl_c_ends_the_line_and_the_program(run, monkeypatch):
    monkeypatch.setattr(os, "_exit", sys.exit)
    assert run("--prompt=a", "--seed=13") == (130, "two\n", "error: interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --prompt=TEXT or --prompts=FILE"),
        (["--prompt=a", "--prompts=b"], "give either --prompt=TEXT or --prompts=FILE"),
        (["--prompt="], "prompt 1 of 1 is empty; give it at least one character"),
        (["--prompt=a", "--top_p=0.9"], "top_p=0.9 changes nothing at temperature=0; use temperature=1"),
        (["--prompt=a", "--temperature=x"], "flag --temperature=x: could not convert"),
        (["--prompt=a", "--max_new_tokens=0"], "flag --max_new_tokens=0: 0 is not a positive integer"),
        (["--prompt=a", "--cache=int4"], "flag --cache=int4: value should be one of <auto|int8>"),
        (["--prompt=a", "--stop="], "an empty string is no stop: ['']; leave it out"),
        (["--prompt=a", "--step=4"], "checkpoints has no complete checkpoint of step 4; it has 2"),
        (
            ["--prompt=a", "--compress=snapkv"],
            "--compress=snapkv has no cap; say how many slots a head keeps, as snapkv:cap=1024",
        ),
        (["--prompt=a", "--compress=snapkv:cap=1e3"], "--compress=snapkv:cap=1e3: cap='1e3' must be of type int"),
        (["--prompt=a", "--compress=snapkv:cpa=9"], "--compress=snapkv:cpa=9 names 'cpa', and has only cap, window, kernel, "),
        (["--prompt=a", "--compress=snap:cap=99"], "method='snap' is not one of 'snapkv', "),
        (["--prompt=a", "--mesh=tensor=4"], "model.num_kv_heads 2 does not split over 4 tensor shards"),
        (
            ["--prompt=a", "--mesh=tensors=4"],
            "--mesh=tensors=4 names 'tensors', and has only slice, data, fsdp, expert, context, tensor",
        ),
        (["--prompt=a", "--mesh=tensor=9"], "needs 9 devices and 8 are here"),
        (["--prompts=none.jsonl"], "none.jsonl"),
        (["--prompt=a", "--chat_template=none"], "--chat_template=none is not a file; name a file with a Jinja"),
        (["--prompts=chat.jsonl", "--question=a"], "--question follows prompts, and chat.jsonl:1 has messages; make it the"),
        (["--prompt=a", "--out="], "--out= is empty; name a file"),
        (["--prompt=a", "--out=none/out.jsonl", "--step=4"], "none/out.jsonl: No such file or directory"),
        (["--prompt=a", "more"], "'more' is no flag"),
    ],
)
def test_what_cannot_be_answered_is_a_line(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    status, out, err = run(*arguments)
    assert (status, out) == (2, "") and err.startswith("error: ") and message in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n", "in.jsonl has no lines"),
        ('{"prompt": "a"}\n{"prompt"\n', "in.jsonl:2 is not JSON: "),
        (
            '{"prompt": "a"}\n{"prompt": "b", "score": NaN}\n',
            "in.jsonl:2 has a value that JSON in UTF-8 cannot hold: Out of range",
        ),
        ('{"prompt": "a"}\n{"prompt": "b", "x": ["\\ud800"]}\n', "in.jsonl:2 has a value that JSON in UTF-8 cannot hold: "),
        ('{"prompt": "\\udcff"}\n', "in.jsonl:1 has a value that JSON in UTF-8 cannot hold: "),
        ('{"prompt": "a", "x": %s}\n' % ("[" * 100_000), "in.jsonl:1 is nested too deeply to be read"),
        ('["a"]\n', "in.jsonl:1 must hold an object and holds a list"),
        ('{"prompt": "a", "question": 3}\n', 'in.jsonl:1 has something else than text under "question"'),
        ('{"prompt": "a"}\n{"prompt": ""}\n', 'in.jsonl:2 has no text under "prompt"'),
        ('{"prompt": "a"}\n\n{"messages": []}\n', "in.jsonl:3: the field 'messages' has no message"),
        (
            '{"prompt": "a"}\n{"messages": [{"role": "robot", "content": "hi"}]}\n',
            "in.jsonl:2: the chat template fails: the role robot is none of system, user, assistant and tool",
        ),
    ],
)
def test_files_that_are_not_prompts_are_refused_by_line(run, tmp_path, content, message):
    (tmp_path / "in.jsonl").write_text(content)
    (tmp_path / "out.jsonl").write_text("earlier answers")
    status, out, err = run(f"--prompts={tmp_path / 'in.jsonl'}", f"--out={tmp_path / 'out.jsonl'}")
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1, err
    assert (tmp_path / "out.jsonl").read_text() == "earlier answers"


def test_what_is_not_utf8_is_refused_before_the_model_is_read(run, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt": "\xff"}')
    for arguments in ([f"--prompts={tmp_path / 'in.jsonl'}"], ["--prompt=\udcff"], ["--prompt=a", "--question=\udcff"]):
        status, _, err = run(*arguments, directory=tmp_path / "none")
        assert (
            status == 2 and ("is not JSON" in err or "is not UTF-8; put the text into a file" in err) and err.count("\n") == 1
        )


def test_logits_that_are_not_numbers_are_a_failure_of_the_checkpoint(run, tmp_path):
    out = tmp_path / "out.jsonl"
    status, _, err = run("--prompt=a", "--seed=14", f"--out={out}")
    assert status == 1 and err.startswith("error: the checkpoint of step 2 in ") and "of token 0 is nan" in err
    assert err.count("\n") == 1 and not out.exists()


def test_answers_that_cannot_be_written_go_to_stdout_and_the_old_ones_stay(run, tmp_path, monkeypatch):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a"}\n')
    target.write_text("earlier answers")

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomically", full)
        status, out, err = run(f"--prompts={source}", f"--out={target}")
    assert status == 1 and json.loads(out)["prompt"] == "a" and target.read_text() == "earlier answers"
    assert err == f"error: {target} could not be written (No space left on device); the answers are on stdout instead\n"
    (tmp_path / "link").symlink_to(target)
    assert run(f"--prompts={source}", f"--out={tmp_path / 'link'}")[0] == 0
    assert (tmp_path / "link").is_symlink() and json.loads(target.read_text())["prompt"] == "a"
    target.unlink()
    assert run(f"--prompts={source}", f"--out={tmp_path / 'link'}", "--stop=")[0] == 2
    assert (tmp_path / "link").is_symlink() and not target.exists()
    assert run(f"--prompts={source}", f"--out={tmp_path / 'link'}")[0] == 0 and target.exists()


def test_a_directory_without_a_model_is_a_line(run, tmp_path):
    status, _, err = run("--prompt=a", directory=tmp_path / "none")
    assert (status, err.count("\n")) == (2, 1) and "none is no directory; name a run's workdir" in err
