"""Who imports whom: read from the source of every module, without running it."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hybrid_attn"
OUTSIDE = {"tools", "launch", "configs", "tests"}
# A room and the rooms that it may import: those to its left, and what it needs from the side.
CONFIG = ("config_model", "config_older", "config_training", "config")
LEFT_TO_RIGHT = ("trees", "names", *CONFIG, "kernels", "parallel", "model", "infer", "evals", "train")
ALLOWED = {room: set(LEFT_TO_RIGHT[:i]) for i, room in enumerate(LEFT_TO_RIGHT)}
ALLOWED["config"] |= {"configs"}
ALLOWED["config_older"] |= {"configs"}  # the defaults of keys that older configs lack
ALLOWED |= {room: {"trees", "config", "parallel"} for room in ("data", "checkpoint", "convert")}
ALLOWED |= {room: set() for room in ("quiet", "characters")} | {"files": {"trees"}}
ALLOWED |= {"config_file": {"trees"}, "programs": {"allocator", "config_file", "quiet", "characters"}, "stored": {"files"}}
ALLOWED |= {"upcycle": {"trees", "merge", "config_model", "configs"}, "merge": {"trees"}, "compiled": set(), "allocator": set()}
ALLOWED["checkpoint"] |= {"stored", "files"}
ALLOWED["parallel"] |= {"files"}  # messages between processes are JSON objects
ALLOWED["convert"] |= {"files"}
ALLOWED["infer"] |= {"data", "checkpoint", "files"}
ALLOWED["evals"] |= {"data", "files", "characters"}
ALLOWED["data"] |= {"files", "characters"}
ALLOWED["train"] |= {"data", "checkpoint", "compiled", "files", "stored"}
ALLOWED["bench"] = {*LEFT_TO_RIGHT, "convert", "data", "checkpoint", "files", "config_file", "allocator"}
ALLOWED["studies"] = {*LEFT_TO_RIGHT, "bench", "config_file", "files", "programs"}
ALLOWED["plan"] = ALLOWED["bench"] | {"bench"}
ALLOWED["bench"] |= {"configs"}  # the defaults, which a comparison with other libraries leaves as they are
ALLOWED |= {"configs": set(), "commands": set(ALLOWED) | {"configs"}}


@functools.cache
def imported(path: Path) -> set[str]:
    """Full names of the modules, and of the names from them, that a file imports anywhere in it."""
    package, names = path.relative_to(ROOT).parent.parts, set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def rooms_of(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("hybrid_attn.")}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_the_rooms_that_the_design_gives_it(path):
    assert room(path) in ALLOWED, "a new room needs its place in the order"
    assert rooms_of(imported(path)) <= ALLOWED[room(path)] | {room(path)}


def test_only_the_trainer_and_what_answers_import_checkpoints():
    importers = {room(path) for path in FILES if "checkpoint" in rooms_of(imported(path))}
    assert importers == {"train", "infer", "commands"}


def test_nobody_but_the_engine_knows_the_modules_of_the_cache_and_they_do_not_know_the_engine():
    cache = "hybrid_attn.infer.cache"
    for path in FILES:
        inside = path.is_relative_to(PACKAGE / "infer" / "cache")
        of_infer = {name for name in imported(path) if name.startswith("hybrid_attn.infer")}
        if inside:
            assert all(name.startswith(cache) for name in of_infer), path
        elif room(path) not in ("infer", "commands", "bench"):
            assert not any(name.startswith(cache) for name in of_infer), path


def test_nobody_imports_programs_or_configs():
    programs = [*(ROOT / "tools").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
    assert programs
    for path in (*FILES, PACKAGE / "__init__.py", *programs):
        assert not {name.split(".")[0] for name in imported(path)} & OUTSIDE, path
    readers = {"extend": {"checkpoint", "config", "evals", "infer", "train"}}  # its model is that of a checkpoint
    readers |= {"adapt": {"checkpoint", "config", "infer"}}  # and so is this
    readers |= {"mixture": {"trees", "upcycle"}}  # its model is what the tool makes of a dense one
    for path in (ROOT / "configs").rglob("*.py"):
        assert rooms_of(imported(path)) <= {"configs"} | readers.get(path.stem, set()), path


def test_only_the_programs_of_the_repository_import_commands():
    assert not {path for path in FILES if room(path) != "commands" and "commands" in rooms_of(imported(path))}


def test_the_package_itself_imports_nothing_of_ours():
    assert not rooms_of(imported(PACKAGE / "__init__.py"))


def test_the_reader_sees_every_way_to_import(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "hybrid_attn" / "model" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import hybrid_attn.train.loop as loop\nfrom hybrid_attn import data\nfrom . import flops\n"
        "def f():\n    from ..evals.position import run\n    import configs.base\n"
    )
    assert rooms_of(imported(path)) == {"train", "data", "model", "evals"}
    assert "configs.base" in imported(path)


def test_reading_a_checkpoint_loads_neither_the_trainer_nor_the_model():
    code = "import sys, hybrid_attn.checkpoint; print(*[m for m in sys.modules if m.startswith('hybrid_attn.')])"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "hybrid_attn.checkpoint" in loaded.stdout
    rooms = {"checkpoint", "kernels", "configs", *CONFIG} | ALLOWED["checkpoint"]
    assert {name.split(".")[1] for name in loaded.stdout.split()} <= rooms
