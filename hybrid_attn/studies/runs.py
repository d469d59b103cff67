"""The runs of a study: the config of a cell with a seed, its workdir, its command, and what is recorded of it at its end."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from hybrid_attn import config, config_file, trees
from hybrid_attn.bench import machine
from hybrid_attn.files import object_of, read_object
from hybrid_attn.studies.metrics import Metric, Trained
from hybrid_attn.studies.study import Study, config_name
from hybrid_attn.train import curves, evaluation
from hybrid_attn.train.cost import flops_per_token
from hybrid_attn.train.metrics import METRICS

COST = "cost.jsonl"  # of a workdir: what child.py wrote of each process that trained in it
LOG = "output.txt"  # of a workdir: what these processes printed


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: of a cell with a seed. `changes` are keys of `config_file` that have another value."""

    cell: str
    seed: int
    config_file: str
    changes: Mapping[str, object]
    config: config.Config
    root: Path
    one_core: bool = False

    @property
    def hash(self) -> str:
        """Of the values that differ from the defaults: new keys with a default do not change it."""
        return hashlib.sha256("\n".join(config.changes(self.config)).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        return f"{self.cell} seed {self.seed}"

    @property
    def workdir(self) -> Path:
        """Its name has the hash, so that no run goes on from the checkpoint of another config, and studies share runs.

        It is in `root`, unless another study, whose folder of workdirs is beside `root`, began the same run before.
        """
        name = f"{self.seed}-{self.hash}" + "-one-core" * self.one_core
        own = self.root / self.cell / name
        others = [] if own.exists() else sorted(self.root.parent.glob(f"*/*/{name}"))
        return others[0] if others else own

    @property
    def log(self) -> Path:
        return self.workdir / LOG

    def arguments(self) -> list[str]:
        """Those of launch/train.py."""
        changes = [f"--config.{key}={value}" for key, value in self.changes.items()]
        return [f"--config={self.config_file}", f"--workdir={self.workdir}", *changes]


def runs_of(study: Study, folder: Path, root: Path, cells: Sequence[str], seeds: int) -> list[Run]:
    """The runs of these cells in the order of the seeds, with workdirs in `root`; ValueError where a config is wrong.

    A seed is that of the initial parameters and of the order or the sampling of the data.
    """
    return [_run(study, folder, root, cell, seed) for seed in range(seeds) for cell in cells]


def _run(study: Study, folder: Path, root: Path, name: str, seed: int) -> Run:
    cell = study.cells[name]
    file, changes = config_name(folder, cell), {**study.changes, **cell.changes, "seed": seed, "data.seed": seed}
    trees.check(
        Path(file.partition(":")[0]).is_file(),
        f"the cell {name!r} names {cell.config}: no such file in {folder} or {Path.cwd()}",
    )
    values = config_file.load(file)
    for key, value in changes.items():
        trees.override(config.Config, values, "config", key, str(value))
    return Run(name, seed, file, changes, config.build(values), root, study.one_core)


def cost(c: config.Config) -> tuple[float, int]:
    """FLOPs and tokens of a training, padding included."""
    tokens = c.stage_tokens(c.total_steps)
    return sum(n * flops_per_token(c.at(stage)) for stage, n in enumerate(tokens)), sum(tokens)


def is_complete(run: Run) -> bool:
    """Whether the last step of the run is logged and evaluated; a run that was stopped early may have no line yet."""
    c, path = run.config, run.workdir / METRICS
    try:
        is_trained = curves.read(path)[-1]["step"] == c.total_steps
    except (OSError, ValueError):
        return False
    return is_trained and (not evaluation.is_enabled(c) or evaluation.report_in(run.workdir, c.total_steps).exists())


def costs(workdir: Path) -> tuple[float | None, dict]:
    """CPU seconds of all processes that trained in a workdir, None where they are not known, and the machine of the last.

    A process that was killed has written its start and not its end. Older lines have neither start nor machine, and the machine
    is then this one.
    """
    path = workdir / COST
    lines = [object_of(text, f"{path}, a line") for text in (path.read_text().splitlines() if path.exists() else ())]
    ended = [line for line in lines if "cpu_seconds" in line]
    starts, ends = ({line.get("started") for line in some} for some in (lines, ended))
    is_known = starts == ends and any(line["exit_code"] == 0 for line in ended)
    machines = [line["machine"] for line in lines if "machine" in line]
    return sum(x["cpu_seconds"] for x in ended) if is_known else None, machines[-1] if machines else machine.describe()


def line_of(run: Run, metrics: Mapping[str, Metric]) -> dict:
    """The line of results.jsonl of a complete run; ValueError for a metric that cannot be read."""
    seconds, trained_on = costs(run.workdir)
    trained = Trained(run.workdir, run.config.total_steps, seconds, *cost(run.config))
    about = read_object(run.workdir / "about.json")
    return {
        "cell": run.cell,
        "seed": run.seed,
        "config": run.hash,
        "metrics": {name: read_metric(name, metric, trained) for name, metric in metrics.items()},
        "cpu_seconds": None if seconds is None else round(seconds, 1),
        "flops": trained.flops,
        "tokens": trained.tokens,
        "revision": about["revision"],
        "versions": about["versions"],
        "machine": trained_on,
    }


def read_metric(name: str, metric: Metric, run: Trained) -> float | None:
    """The number of a run; ValueError, whatever the function of the metric raises, and for what is no finite number."""
    try:
        value = metric.read(run)
        trees.check(value is None or math.isfinite(value), f"it is {value}")
    except Exception as error:
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        raise ValueError(f"the metric {name!r}: {kind}{error}") from error
    return value if value is None or isinstance(value, int) else float(value)
