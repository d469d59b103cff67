"""The error of a config file has its line, and every key of a config is a flag of every program that has one."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver
from conftest import tool
from test_config import DEFAULTS, KEYS, is_optional

from configs import base
from hybrid_attn import config, config_file, trees
from hybrid_attn.programs import parse

ROOT = Path(__file__).parents[1]
PROGRAMS = [ROOT / "launch/train.py", *sorted((ROOT / "tools").glob("*.py"))]
GET_CONFIG = "from configs import base\n\n\ndef get_config():\n    c = base.get_config()\n"


def overridden(key, text):
    values = copy.deepcopy(DEFAULTS)
    trees.override(config.Config, values, "config", key, text)
    return config.build(values)


def flag_of(path):
    """stages[0].steps of stages.0.steps."""
    return path.replace("stages.0", "stages[0]")


def at(c, path):
    value = config.to_dict(c)
    for key in path.split("."):
        value = value[int(key) if key.isdigit() else key]
    return value


@pytest.mark.parametrize("path", KEYS)
def test_every_key_can_be_set_on_the_command_line_and_optional_keys_can_be_none(path):
    value = KEYS[path]
    assert at(overridden(flag_of(path), str(value)), path) == (list(value) if isinstance(value, tuple) else value)
    if is_optional(path):
        name, texts = path.rpartition(".")[2], {"task": "None", "store": "gs://a/b", "label": "news", "turn_indicator": "mass"}
        text = (texts | dict.fromkeys(("ema_half_life", "bias_rate", "rank_fraction"), "0.5")).get(name, "7")
        with_others = "step", "unembed_init_std", "rollback_steps", "lr_schedule", "preference", "shared_d_ff", "share_kv"
        alone = (
            name not in with_others and not path.endswith("tokens") and (not path.endswith("chunk") or "kinds.L" not in path)
        )
        if alone:
            assert str(at(overridden(flag_of(path), text), path)) in (text, f"{text}.0")
        assert "rope_theta" in path or at(overridden(flag_of(path), "None"), path) is None


@pytest.mark.parametrize("path", KEYS)
def test_any_invalid_text_for_a_key_is_one_line_that_names_the_key(path):
    name = path.rpartition(".")[2]
    for text in (
        "nan",
        "-inf",
        "1e300",
        "9" * 400,
        "-1",
        "0",
        "",
        "None",
        "x",
        "(",
        "('a',",
        "[[]]",
        "{1: 2}",
        "\0",
        "a\nb",
        "[" * 10**4,
    ):
        try:
            overridden(flag_of(path), text)
        except ValueError as error:
            assert name in str(error), error


def test_lists_are_written_with_commas_or_as_python_writes_them_and_flags_without_a_value():
    assert overridden("evals.names", "position,needle").evals.names == ("position", "needle")
    assert overridden("evals.lengths", "(1.0, 0.5)").evals.lengths == overridden("evals.lengths", "1,0.5").evals.lengths
    assert overridden("data.sources.text.paths", "a/*.txt").data.sources["text"].paths == ("a/*.txt",)
    assert overridden("stages[-1].mixture", "{'text': 2}").stages[0].mixture == {"text": 2.0}
    assert overridden("model.kinds.G.sink", None).model.kinds["G"].sink and not overridden("train.zigzag", "false").train.zigzag


@pytest.mark.parametrize(
    "key, text, message",
    [
        ("stages[1].steps", "3", r"^config.stages\[1\] does not exist: config.stages has 1 entry, counted from 0$"),
        ("stages.steps", "3", r"^config.stages is a list; write config.stages\[0\].steps$"),
        ("optim[0]", "3", r"^config.optim is no list, and has no entry \[0\]$"),
        ("optim.lr.x", "3", "^config.optim.lr=0.006 is a value, and has no key 'x'$"),
        ("optim..lr", "3", "is no key; write a.b"),
        ("optim.lr", None, "^--config.optim.lr has no value; write --config.optim.lr=VALUE$"),
        ("train.zigzag", "maybe", "^config.train.zigzag='maybe' must be true or false$"),
        ("seed", "1e20", "^config.seed='1e20' must be of type int$"),
        ("mesh", "4", "^config.mesh=4 must be a group of keys$"),
        ("model.kinds.X.window", "4", "^unknown key config.model.kinds.X; known keys: G, L$"),
    ],
)
def test_a_flag_of_an_unknown_key_or_a_wrong_value_is_an_error_with_the_valid_form(key, text, message):
    with pytest.raises(ValueError, match=message):
        overridden(key, text)


@pytest.mark.parametrize(
    "text, message",
    [
        (GET_CONFIG + "    c.optim.lr = = 3\n", "mine.py, line 6: SyntaxError: invalid syntax: c.optim.lr = = 3"),
        (GET_CONFIG + "    c.optim.lr = 1 / 0\n", "mine.py, line 6: ZeroDivisionError: division by zero"),
        (GET_CONFIG + "    c.optim.lr = 'x'\n", "mine.py, line 6: TypeError: "),
        (GET_CONFIG + "    raise ValueError('no such\\nsize')\n", "mine.py, line 6: no such size"),
        (GET_CONFIG + "    exit('bye')\n", "mine.py, line 6: SystemExit: bye"),
        (GET_CONFIG, "mine.py: get_config() returns None, and must return a ConfigDict"),
        ("import nowhere\n", "mine.py, line 1: ModuleNotFoundError: No module named 'nowhere'"),
        ("x = 3\n", "mine.py: it has no function get_config()"),
        ("x = '\0'\n", "mine.py"),
        ("def get_config(a, b):\n    return {}\n", "TypeError: "),
        ("def get_config():\n    return get_config()\n", "mine.py, line 2: RecursionError: "),
    ],
)  # fmt: skip
def test_a_config_file_that_fails_says_its_line_and_why_in_one_line(text, message, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError) as caught:
        config_file.load(str(tmp_path / "mine.py"))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_file_outside_the_repository_is_read_and_its_errors_are_named(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        GET_CONFIG.replace("get_config():\n    c", "get_config(rate='1'):\n    c")
        + "    c.optim.lr = float(rate)\n    return c\n"
    )
    assert config.build(config_file.load(f"{path}:0.5")).optim.lr == 0.5
    with pytest.raises(ValueError, match="^config.optim.lr=nan must be a finite number$"):
        config.build(config_file.load(f"{path}:nan"))
    path.write_text(GET_CONFIG + "    c.optim.learning_rate = 1.0\n    return c\n")
    with pytest.raises(ValueError, match="unknown key config.optim.learning_rate; did you mean config.optim.lr"):
        config.build(config_file.load(str(path)))
    with pytest.raises(ValueError, match="mine.py: get_config.. takes no argument, and '8b' is one"):
        config_file.load(f"{path}:8b")


def ended(program, arguments, capsys):
    """The exit code and stderr of a program, in this process."""
    with tool(program) as module, flagsaver.flagsaver(), pytest.raises(SystemExit) as end:
        module.main(parse([f"{program}.py", *arguments]))
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "program, arguments",
    [
        ("plan", ["--target=cpu:1", "--config=configs/base.py"]),
        ("inspect_data", ["--config=configs/base.py"]),
        ("import_hf", ["--model=x", "--out=y"]),
        ("bench", ["--part=step", "--config=configs/bench.py"]),
    ],
)
def test_a_typo_in_a_key_is_one_line_with_the_nearest_key_in_every_program_with_a_config(
    program, arguments, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    code, error = ended(program, [*arguments, "--config.optim.learning_rate=1"], capsys)
    assert (code, error) == (2, "error: unknown key config.optim.learning_rate; did you mean config.optim.lr?\n")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["workdir=wd"], "'workdir=wd' is no flag: flags begin with --"),
        (["--workdir="], "--workdir is empty"),
        (["--join_timeout=nan"], "--join_timeout=nan must be a finite number"),
        (["--join_timeout=1e300"], "flag --join_timeout=1e300: 1e+300 is not a number in the range [1, 1000000]"),
        (["--config=configs"], "--config=configs: no such file"),
        (["--config="], "--config=: no such file"),
        (["--steps=0"], "config.stages[0].steps=0 must be at least 1"),
        (["--batch=-3"], "config.stages[0].batch=-3 must be at least 1"),
        (["--config.optim.b1=1.5"], "config.optim.b1=1.5 must be at least 0 and below 1"),
        (["--config.optim.b2=1"], "config.optim.b2=1.0 must be at least 0 and below 1"),
        (["--config.optim.eps=-1"], "config.optim.eps=-1.0 must be positive"),
        (["--config.optim.weight_decay=-5"], "config.optim.weight_decay=-5.0 must be at least 0"),
        (["--config.optim.final_lr_ratio=-1"], "config.optim.final_lr_ratio=-1.0 must be at least 0 and at most 1"),
        (["--config.optim.final_lr_ratio=nan"], "config.optim.final_lr_ratio=nan must be a finite number"),
        (["--config.optim.z_loss=-1"], "config.optim.z_loss=-1.0 must be at least 0"),
        (["--config.data.prefetch=100000"], "config.data.prefetch=100000 must be at least 1 and at most 256"),
        (["--config.model.num_layers=1000000000"], "config.model.num_layers=1000000000 must be at least 1 and at most 10,000"),
        (
            ["--config.stages[0].seq_len=100000000000"],
            "config.stages[0].seq_len=100000000000 must be at least 1 and at most 134,",
        ),
        (
            ["--config.stages[0].batch=16777216"],
            "config.stages[0]: batch=16777216 times seq_len=8192 is 137,438,953,472 tokens",
        ),
        (["--config.evals.lengths=100000"], "evals.lengths: 100000.0 of the last seq_len, 8,192, is 819,200,000 tokens"),
        (["--noconfig.train.zigzag=true"], "--noconfig.train.zigzag=true: write --noconfig.train.zigzag"),
    ],
)
def test_a_wrong_flag_of_the_training_program_is_one_line_with_the_flag_and_the_bound(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    code, error = ended("train", ["--config=configs/base.py", f"--workdir={tmp_path}", *arguments], capsys)
    assert code == 2 and error.count("\n") == 1 and error.startswith(f"error: {message}"), error


@pytest.mark.parametrize("name", ["train", "plan"])
def test_steps_and_batch_are_those_of_the_last_stage(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    with tool(name) as program, flagsaver.flagsaver():
        target = ["--target=cpu:1"] if name == "plan" else []
        parse([name, *target, "--config=configs/command_a.py", "--steps=7", "--batch=3", "--noconfig.train.zigzag"])
        c = config.build(program.CONFIG.value.values)
        assert [stage.steps for stage in c.stages] == [30_000, 10_000, 5_000, 7]
        assert [stage.batch for stage in c.stages] == [512, 128, 32, 3] and not c.train.zigzag
        assert name == "plan" or program.read_workdir() == "runs/command_a"


@pytest.mark.parametrize(
    "once, again",
    [
        ("--steps=5", "--config.stages[0].steps=7"),
        ("--config.stages[0].batch=2", "--config.stages[-1].batch=3"),
        ("--config.optim.lr=0.1", "--config.optim.lr=0.2"),
        ("--config.train.zigzag", "--noconfig.train.zigzag"),
    ],
)
def test_a_key_with_two_values_is_refused_and_the_same_one_twice_is_not(once, again, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with tool("train"), flagsaver.flagsaver():
        parse(["train.py", "--config=configs/base.py", once, once.replace("=0.1", "=1e-1")])
    code, error = ended("train", ["--config=configs/base.py", again, once], capsys)
    assert code == 2 and "has two values: --" in error and error.count("\n") == 1, error
    assert again.partition("=")[2] in error and once.partition("=")[2] in error


def test_an_index_into_an_empty_list_is_an_error_that_calls_it_empty():
    values = config.to_dict(config.build(base.get_config())) | {"stages": []}
    with pytest.raises(ValueError, match=r"^config.stages\[-1\] does not exist: config.stages is empty$"):
        trees.override(config.Config, values, "config", "stages[-1].steps", "3")


def test_overrides_come_from_flag_files_too_and_stop_at_two_dashes(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "flags").write_text("--config.optim.lr=0.25\n--config=configs/base.py\n")
    with tool("inspect_data") as program, flagsaver.flagsaver():
        rest = parse(["inspect_data.py", f"--flagfile={tmp_path}/flags", "--", "--config.optim.b1=0.5"])
        assert program.CONFIG.value.values["optim"]["lr"] == 0.25 and math.isclose(
            program.CONFIG.value.values["optim"]["b1"], 0.9
        )
        assert rest[1:] == ["--config.optim.b1=0.5"]


HELP = """
import os
import sys

for name in ("safetensors", "tokenizers", "matplotlib", "pyarrow", "zstandard", "transformers", "torch", "lm_eval"):
    sys.modules[name] = None
import hybrid_attn.train.loop  # which takes most of the time of each program

folder, *paths = sys.argv[1:]
for path in paths:
    if os.fork() == 0:
        os.dup2(os.open(f"{folder}/{os.path.basename(path)}.txt", os.O_CREAT | os.O_WRONLY), 1)
        os.dup2(1, 2)
        sys.argv = [path, "--help"]
        exec(compile(open(path).read(), path, "exec"), {"__name__": "__main__", "__file__": path})
        sys.exit()
    os.wait()
"""


@pytest.fixture(scope="module")
def helps(tmp_path_factory):
    """A folder with what each program says to --help where no extra is installed."""
    folder = tmp_path_factory.mktemp("help")
    command = [sys.executable, "-W", "ignore", "-c", HELP, folder, *PROGRAMS]
    assert subprocess.run(command, cwd=ROOT, timeout=600).returncode == 0
    return folder


@pytest.mark.slow  # it imports JAX in a process of its own
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_help_needs_no_extra(program, helps):
    said = (helps / f"{program.name}.txt").read_text()
    assert "Traceback" not in said and "flags:" in said


def test_flags_are_as_before_when_a_tool_has_ended():
    assert "config" not in flags.FLAGS
