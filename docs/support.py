"""Makes docs/support.md of the tables of the code and of the tests that pytest collects: python docs/support.py

python docs/support.py --why=ring              # the tests behind a row of the page

A test uses an entry of a table if the name of the entry is a word of a short text in its code, or of its parameters. Where
other things have that name too, it must stand in a form of `USES`, such as {"train.remat": "layer"}. Docstrings, comments, long
texts and expected errors do not count, nor do tests whose name says that something is refused. The code of a test is its
function, and the functions, fixtures and constants of its module that it names. Of tests that compile, in processes of their
own, and of tests/oracle, which needs other libraries, it is the file. Nothing is run. It needs the packages of `make test`.
"""

import argparse
import ast
import contextlib
import functools
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "support.md"
COLUMNS = {  # of the page: the files of their tests
    "CPU": "test_(?!aot|device|kernels_gpu|kernels_tpu)",
    "interpreted": "test_kernels_(gpu|tpu)",
    "compiled": "test_aot",
    "beside a library": "oracle",
}
KERNELS, CONTEXT, AXES, REMAT, EVALUATIONS = (
    "Attention kernels (`train.kernel`)",
    "Context parallelism (`train.context`)",
    "Mesh axes",
    "Remat (`train.remat`)",
    "Evaluations",
)
LAYERS = "Mixers and feed-forwards"
ON_DEVICES = {KERNELS: ["CPU", "interpreted", "compiled"]} | dict.fromkeys((CONTEXT, AXES, REMAT), ["CPU", "compiled"])
BESIDE = dict.fromkeys(("Adapters", "Objectives", "Model families"), ["CPU", "beside a library"])
# What a use of an entry NAME is, where the bare name is not enough because other things have it too: the forms of `of_node`.
USES = {
    AXES: r"(mesh_of|abstract_mesh|Mesh)\(NAME=(|-1|[2-9]|\d\d+)|NAME=(-1|[2-9]|\d\d+)",  # more than one shard
    REMAT: r"(\w+\()?(remat|every\(|[A-Z])=NAME",
    LAYERS: r"(\w+\()?(mixer|type)=NAME",
    EVALUATIONS: r"hybrid_attn\.evals\.NAME|(\w+\()?(suite|names|eval|evals|Unit\(|EVALS)=NAME",
    "reference": r"(\w+\()?(kernel|alone\(|run\()=NAME",  # the kernel: preferences have a reference as well
    "gated": r"hybrid_attn\.model\.mlp\.GatedMLP",  # the default, which no config names
}

HEAD = """# What the tests cover

`docs/support.py` makes this page of the tables of the code and of the tests that pytest collects, and a test checks that it is
current. "yes" says that a test uses the entry: its code or its parameters have the name as a value. Docstrings, comments and
expected messages do not count, nor do tests of what is refused. "—" says that no test names the entry there; a default, which
no test needs to name, may run all the same. The page does not say that every combination of two entries is tested.
To see the tests behind a row:

```text
python docs/support.py --why=ring
```

| column | |
|---|---|
| CPU | run on CPU devices, one or up to eight that JAX simulates: `make test` and `make test-slow` |
| interpreted | kernels of GPUs and TPUs in Pallas' interpreter, on a CPU |
| compiled | compiled ahead of time for TPUs or H100s, not run: `make test-aot` and `make test-aot-gpu` |
| beside a library | `make test-oracle` compares with `transformers`, PEFT, TRL and others |

**Nothing here was run on a TPU or a GPU.** `make test-tpu` and `make test-gpu` do that, on a machine that has one.
"""


def entries() -> dict[str, list[str]]:
    """The names in each table of the code."""
    sys.path.insert(0, str(ROOT))
    from hybrid_attn import config, kernels
    from hybrid_attn.convert.families import FAMILIES
    from hybrid_attn.evals.table import EVALS
    from hybrid_attn.model.transformer import MIXERS, MLPS
    from hybrid_attn.model.transforms import TRANSFORMS
    from hybrid_attn.parallel import context, mesh
    from hybrid_attn.train.objectives import OBJECTIVES
    from hybrid_attn.train.optim import OPTIMISERS
    from hybrid_attn.train.sinks import SINKS

    return {
        KERNELS: [*kernels.KERNELS],
        CONTEXT: [*context.SCHEMES],
        AXES: [*mesh.AXES],
        REMAT: [*config.REMAT],
        LAYERS: [*MIXERS, *MLPS],
        "Adapters": [*TRANSFORMS],
        "Objectives": [*OBJECTIVES],
        "Optimisers": [*OPTIMISERS],
        "Model families": [*FAMILIES],
        EVALUATIONS: [*EVALS],
        "Sinks": [*SINKS],
    }


def words(text: str) -> list[str]:
    """The words of a text of one or two, such as a name, a list of names or a flag; longer ones are prose, or messages."""
    return re.findall(r"-?\w+", text) if len(text.split()) < 3 else []


def of_text(text: str) -> Iterator[str]:
    """The words of a text, and KEY=WORD of a flag or an override such as --config.train.context=G=ring."""
    yield from words(text)
    key, assigned, value = text.partition("=")
    if assigned:
        yield from (f"{last(key)}={word}" for word in words(value))


def last(key) -> str:
    """train.kernel and --config.train.kernel are the key `kernel`."""
    return str(key).split(".")[-1].strip("-")


def of_value(name: str, value) -> Iterator[str]:
    """What is used in the value of a parameter of that name, or of a key in it."""
    if isinstance(value, str | int):
        yield from (*of_text(str(value)), *(f"{name}={word}" for word in words(str(value))))
    elif hasattr(value, "_asdict"):
        yield from of_value(name, value._asdict())
    elif isinstance(value, dict):
        yield from (use for key, x in value.items() for use in (*of_text(str(key)), *of_value(last(key), x)))
    elif isinstance(value, list | tuple | set | frozenset):
        yield from (use for x in value for use in of_value(name, x))


def constants(node: ast.AST) -> list[str]:
    """The words of the constants in an expression; one that is empty where it has none."""
    return [word for x in ast.walk(node) if isinstance(x, ast.Constant) for word in words(str(x.value))] or [""]


def of_node(node: ast.AST) -> Iterator[str]:
    """What is used in a node of code: words, KEY=WORD of dicts and loops, CALLED(KEY=WORD and CALLED(=WORD of arguments."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield from of_text(node.value)
    elif isinstance(node, ast.Dict):
        pairs = [(x.value, value) for x, value in zip(node.keys, node.values, strict=True) if isinstance(x, ast.Constant)]
        yield from (f"{last(key)}={word}" for key, value in pairs for word in constants(value))
    elif isinstance(node, ast.Call):
        called = last(ast.unparse(node.func))
        yield from (f"{called}({x.arg}={word}" for x in node.keywords for word in constants(x.value))
        yield from (f"{called}(={word}" for x in node.args if isinstance(x, ast.Constant) for word in constants(x))
    elif isinstance(node, ast.For | ast.comprehension) and isinstance(node.target, ast.Name):
        yield from (f"{node.target.id}={word}" for word in constants(node.iter))


def is_left_out(node: ast.AST) -> bool:
    """A text that nothing uses, as a docstring is, and an error that a test expects."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    return isinstance(node, ast.Call) and last(ast.unparse(node.func)) == "raises"


class Part(NamedTuple):
    """What a function or a constant of a module uses of the tables, and the names in it."""

    uses: set[str]
    names: set[str]


def part_of(*trees: ast.AST) -> Part:
    uses, names, nodes = set(), set(), [*trees]
    while nodes:
        node = nodes.pop()
        if not is_left_out(node):
            uses |= {*of_node(node)}
            names |= {getattr(node, "id", None), getattr(node, "arg", None)}  # an argument may be a fixture
            nodes += ast.iter_child_nodes(node)
    return Part(uses, names)


@functools.cache
def parts_of(path: Path) -> dict[str, Part]:
    """The functions without their decorators, the constants and the imported names of a module, by name."""
    parts = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            parts |= {x.asname or x.name: Part({f"{node.module}.{x.name}"}, set()) for x in node.names}
        elif isinstance(node, ast.FunctionDef):
            parts[node.name] = part_of(node.args, *node.body)
        elif isinstance(node, ast.Assign):
            part = part_of(node.value)
            parts |= {x.id: part for target in node.targets for x in ast.walk(target) if isinstance(x, ast.Name)}
    return parts


def uses_of(item: pytest.Function) -> set[str]:
    """What a test uses: in its parameters, in its function, and in what that names in its module."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    uses = {use for name, value in parameters.items() for use in of_value(name, value)}
    parts, seen, names = parts_of(item.path), set(), {item.originalname}
    while names:
        seen |= names
        parts_here = [parts[name] for name in names if name in parts]
        uses = uses.union(*(part.uses for part in parts_here))
        names = set().union(*(part.names for part in parts_here)) - seen
    return uses


class Collected:
    """A plugin of pytest that keeps the uses in each test that is collected."""

    def __init__(self):
        self.tests: dict[str, set[str]] = {}

    def pytest_collection_finish(self, session) -> None:
        self.tests = {item.nodeid: uses_of(item) for item in session.items}


def collect() -> dict[str, set[str]]:
    """The uses in every test, by its name; of tests that compile and of tests/oracle by file."""
    collected = Collected()
    with contextlib.redirect_stdout(io.StringIO()):
        code = pytest.main(["--collect-only", "-p", "no:cacheprovider", str(ROOT / "tests")], plugins=[collected])
    if code:
        sys.exit(f"pytest could not collect the tests: exit code {int(code)}")
    files = [*(ROOT / "tests").glob("test_aot*.py"), *(ROOT / "tests" / "oracle").glob("test_*.py")]
    of_files = {str(path.relative_to(ROOT)): part_of(ast.parse(path.read_text())).uses for path in sorted(files)}
    return {test: names for test, names in collected.tests.items() if "test_aot" not in test} | of_files


def is_of(column: str, test: str) -> bool:
    """Whether a test belongs to a column."""
    return re.match(COLUMNS[column], re.sub(r"^tests/", "", test)) is not None


def runs_on_cpu(name: str) -> bool:
    """Whether an entry of this name runs on a CPU at all, where tests may name it to see it refused."""
    from hybrid_attn.kernels import KERNELS

    return name not in KERNELS or "cpu" in KERNELS[name].platforms


def about(title: str, name: str, tests: dict[str, set[str]]) -> list[str]:
    """The tests that use an entry of a table."""
    form = re.compile(USES.get(name, USES.get(title, "NAME")).replace("NAME", name))
    return [test for test, uses in tests.items() if "refus" not in test and any(map(form.fullmatch, uses))]


def row(title: str, name: str, columns: list[str], tests: dict[str, set[str]]) -> str:
    using = about(title, name, tests)
    shown = [x for x in columns if any(is_of(x, test) for test in using) and (x != "CPU" or runs_on_cpu(name))]
    return f"| `{name}` | " + " | ".join("yes" if x in shown else "—" for x in columns) + " |"


def page(tests: dict[str, set[str]]) -> str:
    parts = [HEAD]
    for title, names in entries().items():
        columns = (ON_DEVICES | BESIDE).get(title, ["CPU"])
        rows = [f"## {title}", "", "| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
        parts.append("\n".join([*rows, *(row(title, name, columns, tests) for name in names)]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Makes docs/support.md, or shows the tests behind a row.")
    parser.add_argument("--why", help="an entry of a table, such as ring")
    parser.add_argument("--check", action="store_true", help="only say whether the page is current")
    arguments = parser.parse_args()
    tests = collect()
    if arguments.why:
        titles = [title for title, names in entries().items() if arguments.why in names]
        print(*dict.fromkeys(test for title in titles for test in about(title, arguments.why, tests)), sep="\n")
    elif arguments.check:
        sys.exit(None if PAGE.read_text() == page(tests) else "docs/support.md is old: python docs/support.py")
    else:
        PAGE.write_text(page(tests))
