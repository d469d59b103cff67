"""The commands of the pages parse or run, and their config keys, flags, paths, links and picture exist."""

import ast
import functools
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest
from absl.testing import flagsaver
from conftest import tool

from configs import base
from hybrid_attn import config, programs

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for pattern in ("*.md", "docs/*.md", "docs/results/*.md", "studies/*/*.md") for path in ROOT.glob(pattern))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
GROUPS = "model|mesh|data|optim|stages|train|evals|init_from"
FOLDERS = "configs|docs|studies|hybrid_attn|launch|tools|tests|constraints"
NEW_FILE = "mine"  # the name that worked examples give to a file that the reader writes
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def fences(text: str, language: str) -> list[str]:
    return [content for name, content in FENCE.findall(text) if name == language]


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def commands(text: str) -> list[list[str]]:
    """The words of every command: the lines of shell fences, and what begins as one in a sentence."""
    lines = [line for content in fences(text, "sh") for line in content.replace("\\\n", " ").splitlines()]
    lines += [code for code in inline_code(text) if re.match(r"(python|make|pip) ", code)]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def check_command(words: list[str]) -> None:
    """Reads a command as the program itself does; an exception where that refuses it."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    CHECKS[words[0]](words[1:])


def check_python(words: list[str]) -> None:
    path = Path(words[0])
    with tool(path.stem) as module, pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "run", lambda _, argv, *args, arguments=0, **kw: programs.check_arguments(argv, arguments))
        module.main(programs.parse(words))


def check_console_script(module: str, words: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path(f"{NEW_FILE}.py").write_text("from hybrid_attn.configs.base import get_config")
        check_python([f"{module.rpartition('.')[2]}.py", *words])


def check_training(words: list[str]) -> None:
    check_python(["launch/train.py", *words])


def check_script(words: list[str]) -> None:
    check_training(words[words.index("--") + 1 :])


def check_end_to_end(words: list[str]) -> None:
    size, folder, *flags = words
    check_training([f"--config=configs/end_to_end.py:{size}", f"--workdir={folder}", *flags])


def check_sbatch(words: list[str]) -> None:
    script = words.index("launch/slurm.sbatch")
    assert all(word.startswith("--") for word in words[:script])
    check_training(words[script + 1 :])


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    target, values = words[0], dict(word.split("=", 1) for word in words[1:])
    assert target in re.findall(r"[\w./-]+", " ".join(re.findall(r"^([\w./ -]+):", makefile, re.MULTILINE))), target
    assert set(values) <= set(re.findall(r"^(\w+) \?=", makefile, re.MULTILINE)), values
    assert set(values.get("EXTRA", "").split()) <= set(EXTRAS)
    arguments = shlex.split(values.get("ARGS", ""))
    if target == "train":
        check_training([f"--config={values.get('CONFIG', 'configs/hybrid_8k.py')}", *arguments])
    else:
        assert all((ROOT / path).exists() for path in arguments), arguments


def check_pip(words: list[str]) -> None:
    assert words[0] in ("install", "wheel")
    for extra in re.findall(r"\[(.*?)\]", " ".join(words)):
        assert set(extra.split(",")) <= set(EXTRAS), extra


CHECKS = {
    "python": check_python,
    "make": check_make,
    "pip": check_pip,
    "sbatch": check_sbatch,
    "launch/local_processes.sh": check_script,
    "launch/tpu_pod.sh": check_script,
    "launch/end_to_end.sh": check_end_to_end,
}
CHECKS |= {
    name: functools.partial(check_console_script, target.partition(":")[0]) for name, target in PROJECT["scripts"].items()
}


def refusal(check, *arguments) -> str:
    """What `check` says of its arguments; empty if it takes them."""
    try:
        check(*arguments)
    except (Exception, SystemExit) as error:
        return f"{error!r}"
    return ""


def command_problems(text: str) -> list[str]:
    return [f"{shlex.join(words)}: {said}" for words in commands(text) if (said := refusal(check_command, words))]


def check_code(code: str) -> None:
    names: dict = {}
    exec(compile(code, "page", "exec"), names)
    if "get_config" in names:
        config.build(names["get_config"]())


def code_problems(text: str) -> list[str]:
    unknown = {name for name, _ in FENCE.findall(text)} - {"sh", "python", "text"}
    return [f"a fence of {unknown}"] * bool(unknown) + list(
        filter(None, (refusal(check_code, x) for x in fences(text, "python")))
    )


def has_key(key: str) -> bool:
    """Whether configs/base.py has this key; any layer type, source and stage counts as one that it has."""
    for pattern, usual in ((r"kinds\.\w\b", "kinds.L"), (r"sources\.\w+", "sources.text"), (r"stages(\[\w+\])?\.", "stage.")):
        key = re.sub(pattern, usual, key)
    c = base.get_config()
    values, parts = {**c, "stage": c.stages[0]}, key.split(".")
    for part in parts:
        if part not in values:
            return False
        values = values[part]
    return True


def key_problems(text: str) -> list[str]:
    pattern = re.compile(rf"(?<![\w./-])(?:--config\.|c\.)?((?:{GROUPS})(?:\[\w+\])?\.\w[\w.]*)")
    keys = {key for code in inline_code(text) for key in pattern.findall(code)}
    return [f"no config key {key}" for key in sorted(keys) if not key.endswith((".py", ".jsonl")) and not has_key(key)]


def known_flags() -> set[str]:
    sources = [path.read_text() for folder in ("tools", "launch", "hybrid_attn") for path in (ROOT / folder).rglob("*.*y")]
    defined = re.findall(r'DEFINE_\w+\(\s*"(\w+)"|\bdefine\("(\w+)"', "\n".join(sources))
    scripts = "\n".join(path.read_text() for path in (ROOT / "launch").glob("*.s*"))
    return {*filter(None, sum(defined, ())), "steps", "batch", *re.findall(r"--([\w-]+)", scripts)}


def flag_problems(text: str) -> list[str]:
    flags = {flag for code in inline_code(text) for flag in re.findall(r"(?<![\w-])--([\w-]+)", code)}
    return [f"no flag --{flag}" for flag in sorted(flags - known_flags())]


def path_problems(text: str) -> list[str]:
    code = " ".join([*inline_code(text), *fences(text, "sh")])
    paths = {path.rstrip(".") for path in re.findall(rf"(?<![\w./-])((?:{FOLDERS})/[\w./*-]*)", code)}
    paths |= {f"**/{name}" for name in inline_code(text) if re.fullmatch(r"\w+\.(py|sh|sbatch)", name)}
    return [f"no path {path}" for path in sorted(paths) if Path(path).stem != NEW_FILE and not any(ROOT.glob(path))]


def slugs(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def link_problems(text: str, page: Path) -> list[str]:
    problems = []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        if not link.startswith("https://") and not target.exists():
            problems.append(f"no file {link}")
        elif heading and heading not in slugs(target.read_text()):
            problems.append(f"no heading {link}")
    return problems


def problems(text: str, page: Path) -> list[str]:
    checks = command_problems, code_problems, key_problems, flag_problems, path_problems
    return [problem for check in checks for problem in check(text)] + link_problems(text, page)


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_code_keys_flags_paths_and_links_of_a_page_exist(page):
    assert not problems(page.read_text(), page)


BROKEN = {
    "a flag": "```sh\npython tools/plan.py --config=configs/hybrid_8k.py --target=cpu:8 --nothing=1\n```",
    "a config key": "```sh\npython launch/train.py --config=configs/hybrid_8k.py --config.optim.learnrate=1\n```",
    "a key of make": "```sh\nmake train ARGS='--config.model.depths=3'\n```",
    "a target": "```sh\nmake everything\n```",
    "an extra": "```sh\npip install '.[everything]'\n```",
    "a program": "```sh\nnothing --config=configs/hybrid_8k.py\n```",
    "a value of a script": "```sh\nlaunch/local_processes.sh 2 -- --config=configs/hybrid_8k.py --batch=few\n```",
    "a command in a sentence": "Run `python tools/plan.py --config=configs/hybrid_8k.py:nothing --target=cpu:8`.",
    "an argument": "```sh\npython tools/plan.py --config=configs/hybrid_8k.py --target=cpu:8 more\n```",
    "a flag of a console script": "```sh\nhybrid-train --config=mine.py --nothing=1\n```",
    "a required flag": "```sh\npython tools/plan.py --target=cpu:8\n```",
    "code": "```python\nfrom configs import nothing\n```",
    "a config": "```python\ndef get_config():\n    return {'model': {}}\n```",
    "a key in a sentence": "The key `train.rematerialise` says it.",
    "a key of a layer type": "The key `model.kinds.G.windows` says it.",
    "a flag in a sentence": "The flag `--suites=full` says it.",
    "a path": "See `hybrid_attn/kernels/nothing.py`.",
    "a file": "See `nothing.py`.",
    "a link": "See [this](nothing.md).",
    "a heading": "See [this](install.md#nothing).",
    "a language": "```\nwithout one\n```",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_page_with_one_error_has_one_problem(text):
    assert len(problems(text + "\n", ROOT / "docs" / "page.md")) == 1


def test_the_readme_is_short_and_the_index_lists_every_page():
    assert len((ROOT / "README.md").read_text().splitlines()) < 160
    index = ROOT / "docs" / "index.md"
    listed = re.findall(r"^- \[.+\]\((.+)\)$", index.read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(os.path.relpath(x, index.parent) for x in PAGES if x.parent != ROOT and x != index)


def test_the_page_of_studies_has_the_question_of_each():
    page = (ROOT / "docs" / "studies.md").read_text()
    rows = dict(re.findall(r"^\| \[.+\]\((\.\./studies/.+)\) \| (.+) \|$", page, re.MULTILINE))
    studies = {f"../{path.relative_to(ROOT)}": path.read_text() for path in ROOT.glob("studies/*/*.md")}
    assert rows == {path: text.split("\n\n")[1].replace("\n", " ") for path, text in studies.items()}


def test_what_a_page_would_load_from_the_network_is_seen(tmp_path):
    from_network = runpy.run_path(str(ROOT / "docs" / "offline.py"))["from_network"]
    page = tmp_path / "page.html"
    remote = [
        "<script async\nsrc='https://a.org/x.js'></script>",
        '<IMG alt="x" SRC = "//a.org/x.png">',
        '<link href="https://a.org/x.css" rel="alternate stylesheet">',
        '<img srcset="x.png 1x, https://a.org/x.png 2x">',
        "<p style=\"background: url('https://a.org/x.png')\">",
        '<svg><image xlink:href="https://a.org/x.png"/></svg>',
    ]
    for tag in remote:
        page.write_text(tag)
        assert len(from_network(page)) == 1, tag
    page.write_text(
        '<a href="https://a.org/"><img src="x.png"></a><link rel="canonical" href="https://a.org/"><script>"//a"</script>'
    )
    assert from_network(page) == []
    style = tmp_path / "page.css"
    style.write_text("@import '//a.org/x.css'; p { background: url(x.png) } q { background: url( 'https://a.org/x.png' ) }")
    assert from_network(style) == ["//a.org/x.css", "https://a.org/x.png"]


def test_the_pictures_equal_the_output_of_their_scripts(monkeypatch):
    docs = ROOT / "docs"
    monkeypatch.syspath_prepend(docs)
    draw = runpy.run_path(str(docs / "architecture.py"))["draw"]
    pictures = {"architecture": draw} | runpy.run_path(str(docs / "pictures.py"))["PICTURES"]
    drawn = {path: path.read_text() for path in [docs / "architecture.svg", *(docs / "pictures").glob("*.svg")]}
    assert {path.stem: content for path, content in drawn.items()} == {name: draw() for name, draw in pictures.items()}


@pytest.fixture
def llama(tmp_path):
    """A workdir with an imported tiny Llama."""
    with tool("import_hf") as program, flagsaver.flagsaver():
        program.main(programs.parse(["import_hf.py", "--model=tests/golden/llama", f"--out={tmp_path}/checkpoints"])[:1])
    return str(tmp_path)


def test_the_commands_that_extend_a_checkpoint_are_read(llama):
    text = (ROOT / "docs" / "extend.md").read_text()
    lines = " ".join(fences(text, "text")).replace("\\\n", " ").replace("runs/llama_4x", "NEW").splitlines()
    read = [shlex.split(re.sub("runs/llama|runs/hybrid_8k|path/to/Llama-3.1-8B", llama, line)) for line in lines]
    assert len(read) == 7
    assert [refusal(check_command, words) for words in read] == [""] * len(read)


def texts_of(code: str) -> list[str]:
    """The texts in the code, with an ellipsis for each value that is put into one; docstrings are none."""
    nodes = [*ast.walk(ast.parse(code))]
    docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}  # and other texts that nothing uses
    parts = [
        node.values if isinstance(node, ast.JoinedStr) else [node]
        for node in nodes
        if isinstance(node, ast.JoinedStr | ast.Constant) and node not in docstrings
    ]
    return [
        "".join(x.value if isinstance(x, ast.Constant) and isinstance(x.value, str) else "…" for x in values)
        for values in parts
    ]


def templates() -> list[str]:
    """The texts in the code of the package and the tools."""
    files = (path for folder in ("hybrid_attn", "tools") for path in (ROOT / folder).rglob("*.py"))
    return [text for path in files for text in texts_of(path.read_text())]


def quoted_messages(text: str) -> list[str]:
    """The messages of the tables whose first column is what the reader sees."""
    tables = re.findall(r"^\| you see .*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [re.match(r"\| `(.+?)` \|", line)[1] for table in tables for line in table.splitlines()]


def is_message(quoted: str, code: list[str]) -> bool:
    """Whether a text of the code has the words of `quoted`, in order, with values between them."""
    pattern = re.compile(".*".join(re.escape(part) for part in quoted.split("…")), re.DOTALL)
    return any(pattern.search(template) for template in code)


def test_the_messages_of_the_page_of_errors_are_in_the_code():
    messages, code = quoted_messages((ROOT / "docs" / "errors.md").read_text()), templates()
    assert len(messages) > 40 and all(len(max(message.split("…"), key=len)) > 8 for message in messages)
    assert [message for message in messages if not is_message(message, code)] == []
    assert not is_message("a message … that no code has", code)


def test_a_docstring_is_no_message():
    code = 'def f(x):\n    """A docstring."""\n    raise ValueError(f"x is {x} and must not be")\n'
    assert is_message("x is … and must", texts_of(code)) and not is_message("A docstring", texts_of(code))


def unknown_figures(line: str, folder: Path) -> list[str]:
    """The numbers of a row or an item that the pages which it links do not have."""
    links = re.findall(r"\]\(([^)#]+\.md)\)", line)
    pages = "\n".join((folder / link).read_text() for link in links)
    numbers = re.findall(r"(?<![\w.,])\d[\d,.]*%?(?![\w])", re.sub(r"\]\([^)]+\)", "", line))
    numbers = {number.rstrip(".,") for number in numbers}
    return sorted(x for x in numbers if not re.search(rf"(?<![\d.,]){re.escape(x)}(?![\d])", pages))


def test_the_figures_of_the_readme_and_of_the_numbers_to_expect_are_in_the_pages_that_they_link():
    readme, numbers = ((ROOT / name).read_text() for name in ("README.md", "docs/numbers.md"))
    items = re.findall(r"^- (.+?)(?=^- |^$)", readme.partition("## Measured")[2].partition("## ")[0], re.MULTILINE | re.DOTALL)
    rows = [
        line.rpartition("|")[0].partition("|")[2] for line in numbers.splitlines() if line.startswith("|") and ".md)" in line
    ]
    assert len(items) == 4 and len(rows) > 15 and all("](" in line for line in (*items, *rows))
    assert {line: unknown_figures(line, ROOT) for line in items if unknown_figures(line, ROOT)} == {}
    of_row = {row: unknown_figures(row.partition("|")[2], ROOT / "docs") for row in rows}
    assert {row: unknown for row, unknown in of_row.items() if unknown} == {}
    assert unknown_figures("7,777 of [recall](results/recall.md)", ROOT / "docs") == ["7,777"]


def test_the_output_in_the_readme_is_that_of_the_page_of_the_first_run():
    readme, page = (fences((ROOT / name).read_text(), "text")[0].splitlines() for name in ("README.md", "docs/first-run.md"))
    assert [line for line in readme if line not in page] == []


TABLES = {"layouts.md": "compare_layouts"}  # pages whose tables are the output of their first command, a program of tools/


@pytest.mark.parametrize("page", TABLES)
def test_the_tables_of_a_page_are_the_output_of_its_command(page, capsys):
    text = (ROOT / "docs" / page).read_text()
    _, script, *words = next(words for words in commands(text) if Path(words[1]).stem == TABLES[page])
    with tool(TABLES[page]) as program, flagsaver.flagsaver():
        program.main(programs.parse([script, *words])[:1])
    assert capsys.readouterr().out.strip() in text


def test_the_code_map_lists_the_path_to_the_attention_arithmetic():
    text = (ROOT / "docs" / "code-map.md").read_text()
    steps = [re.findall(r"`([^`]+)`", line) for line in re.findall(r"^\d+\. (`(?:launch|hybrid_attn)/.+)$", text, re.MULTILINE)]
    assert steps[0][0] == "launch/train.py" and steps[-1][0] == "hybrid_attn/kernels/blocked.py"
    for path, *names in steps:
        text, names = (ROOT / path).read_text(), [name for name in names if not name.endswith(".py")]
        missing = [name for name in names if not re.search(rf"\b{name}\b", text)]
        assert not missing, f"{path} has no {missing}"


def test_the_names_of_the_code_map_are_in_the_code():
    names = {x for x in inline_code((ROOT / "docs" / "code-map.md").read_text()) if re.fullmatch(r"\w+", x)}
    sources = [path.read_text() for folder in ("hybrid_attn", "tools") for path in (ROOT / folder).rglob("*.py")]
    missing = names - set(re.findall(r"\w+", "\n".join(sources)))
    assert not missing


TINY = [f"--config.model.{key}={value}" for key, value in {"d_model": 32, "d_ff": 48, "num_layers": 2, "head_dim": 8}.items()]
TINY += ["--config.model.pattern=LG", "--config.stages[0].seq_len=64", "--steps=2", "--config.evals.tokens=256"]
SHORTER = {
    "train": TINY,
    "generate": ["--max_new_tokens=2"],
    "evaluate": ["--suite=position", "--lengths=64", "--tokens=256"],
    "plot_runs": [],
}


@pytest.mark.slow  # four programs, each of which starts jax or draws
def test_the_commands_of_a_first_run_follow_one_another(tmp_path):
    output = " ".join(fences((ROOT / "README.md").read_text(), "text"))
    first = [words for words in commands((ROOT / "docs" / "first-run.md").read_text()) if words[1:2] == ["launch/train.py"]]
    then = [shlex.split(line) for line in re.findall(r"python tools/.*", output)]
    assert [Path(words[1]).stem for words in (*first, *then)] == list(SHORTER)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    for _, script, *words in (*first, *then):
        words = [word.replace("configs/", f"{ROOT}/configs/") for word in words]
        subprocess.run([sys.executable, ROOT / script, *words, *SHORTER[Path(script).stem]], cwd=tmp_path, env=env, check=True)
    assert (tmp_path / "loss.png").exists() and (tmp_path / "evals/hybrid_8k/report.html").exists()
