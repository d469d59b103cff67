"""Makes docs/support.md of the tables of the code and of the tests that pytest collects: python docs/support.py

python docs/support.py --why=ring              # the tests behind a row of the page

A test is about an entry of a table if the name of the entry is a word of the test: of its id, of its parameters, of the texts
in its code, or of those of the functions of its module that it calls. Of tests that compile, in processes of their own, and of
tests/oracle, which needs other libraries, the names are those in a file. Nothing is run. It needs the packages of `make test`.
"""

import argparse
import contextlib
import io
import re
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "support.md"
COLUMNS = {  # of the page: the files of their tests
    "CPU": "test_(?!aot|device|kernels_gpu|kernels_tpu)",
    "interpreted": "test_kernels_(gpu|tpu)",
    "compiled": "test_aot",
    "beside a library": "oracle",
}
ACCELERATED = (
    "Attention kernels (`train.kernel`)",
    "Context parallelism (`train.context`)",
    "Mesh axes",
    "Remat (`train.remat`)",
)
BESIDE = {"Adapters", "Objectives", "Model families"}  # the tables whose entries a library has too

HEAD = """# What the tests cover

`docs/support.py` makes this page of the tables of the code and of the tests that pytest collects, and a test holds it. "yes"
says that a test has the entry among its parameters or texts. It does not say that every combination of two entries is tested.
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
        "Attention kernels (`train.kernel`)": [*kernels.KERNELS],
        "Context parallelism (`train.context`)": [*context.SCHEMES],
        "Mesh axes": [*mesh.AXES],
        "Remat (`train.remat`)": [*config.REMAT],
        "Mixers and feed-forwards": [*MIXERS, *MLPS],
        "Adapters": [*TRANSFORMS],
        "Objectives": [*OBJECTIVES],
        "Optimisers": [*OPTIMISERS],
        "Model families": [*FAMILIES],
        "Evaluations": [*EVALS],
        "Sinks": [*SINKS],
    }


def texts(value, depth: int = 4):
    """All texts in a value: those of containers, and of the constants of a function."""
    if isinstance(value, str):
        yield value
    elif depth and isinstance(value, dict):
        yield from (text for pair in value.items() for x in pair for text in texts(x, depth - 1))
    elif depth and isinstance(value, list | tuple | set | frozenset):
        yield from (text for x in value for text in texts(x, depth - 1))
    elif depth and isinstance(value, types.CodeType):
        yield from (text for x in value.co_consts for text in texts(x, depth - 1))


def names_in(item: pytest.Function) -> set[str]:
    """The names in a test, of its parameters, and of the functions of its module that it calls."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    used, codes = [item.name, *item.keywords, parameters], [item.function.__code__]
    seen = set()
    while codes:
        code = codes.pop()
        used.append(code)
        for name in set(code.co_names) - seen:
            seen.add(name)
            value = item.function.__globals__.get(name)
            if isinstance(value, types.FunctionType) and value.__module__ == item.function.__module__:
                codes.append(value.__code__)
    return {word for text in texts(tuple(used)) for word in re.findall(r"\w+", text)}


class Collected:
    """A plugin of pytest that keeps the names in each test that is collected."""

    def __init__(self):
        self.tests: dict[str, set[str]] = {}

    def pytest_collection_finish(self, session) -> None:
        self.tests = {item.nodeid: names_in(item) for item in session.items}


def collect() -> dict[str, set[str]]:
    """The names in every test, by its name; of each file of tests/oracle as one."""
    collected = Collected()
    with contextlib.redirect_stdout(io.StringIO()):
        code = pytest.main(["--collect-only", "-p", "no:cacheprovider", str(ROOT / "tests")], plugins=[collected])
    if code:
        sys.exit(f"pytest could not collect the tests: exit code {int(code)}")
    files = [*(ROOT / "tests").glob("test_aot*.py"), *(ROOT / "tests" / "oracle").glob("test_*.py")]
    of_files = {str(path.relative_to(ROOT)): set(re.findall(r"\w+", path.read_text())) for path in sorted(files)}
    return {test: names for test, names in collected.tests.items() if "test_aot" not in test} | of_files


def is_of(column: str, test: str) -> bool:
    """Whether a test belongs to a column."""
    return re.match(COLUMNS[column], re.sub(r"^tests/", "", test)) is not None


def runs_on_cpu(name: str) -> bool:
    """Whether an entry of this name runs on a CPU at all, where tests may name it to see it refused."""
    from hybrid_attn.kernels import KERNELS

    return name not in KERNELS or "cpu" in KERNELS[name].platforms


def columns_of(title: str) -> list[str]:
    """The columns of a table: what runs on accelerators is also interpreted and compiled."""
    if title in BESIDE:
        return ["CPU", "beside a library"]
    return ["CPU", "interpreted", "compiled"] if title in ACCELERATED else ["CPU"]


def row(name: str, columns: list[str], tests: dict[str, set[str]]) -> str:
    about = [test for test, names in tests.items() if name in names]
    shown = [x for x in columns if any(is_of(x, test) for test in about) and (x != "CPU" or runs_on_cpu(name))]
    return f"| `{name}` | " + " | ".join("yes" if x in shown else "—" for x in columns) + " |"


def page(tests: dict[str, set[str]]) -> str:
    parts = [HEAD]
    for title, names in entries().items():
        columns = columns_of(title)
        rows = [f"## {title}", "", "| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
        parts.append("\n".join([*rows, *(row(name, columns, tests) for name in names)]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Makes docs/support.md, or shows the tests behind a row.")
    parser.add_argument("--why", help="an entry of a table, such as ring")
    parser.add_argument("--check", action="store_true", help="only say whether the page is current")
    arguments = parser.parse_args()
    tests = collect()
    if arguments.why:
        print(*(test for test, names in tests.items() if arguments.why in names), sep="\n")
    elif arguments.check:
        sys.exit(None if PAGE.read_text() == page(tests) else "docs/support.md is old: python docs/support.py")
    else:
        PAGE.write_text(page(tests))
