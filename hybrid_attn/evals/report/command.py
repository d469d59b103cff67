"""The command that measures a section anew."""

import re
import shlex
from collections.abc import Sequence

from hybrid_attn.evals.report import escape
from hybrid_attn.evals.report.fields import DATA
from hybrid_attn.evals.report.runs import Run
from hybrid_attn.evals.ruler.tasks import NAMES
from hybrid_attn.evals.table import EVALS

MESH = re.compile(r"[a-z]+ \d+( x [a-z]+ \d+)*")


def measuring(runs: Sequence[Run], evaluation: str) -> str:
    """What measures an evaluation of these runs anew, with the settings and data of the first.

    Empty where a run names no checkpoint, or where no flag names the text that was asked about.
    """
    settings, data = (runs[0].provenance.get(name, {}) for name in ("settings", "data"))
    if evaluation not in EVALS or not all(run.provenance.get("checkpoint") for run in runs):
        return ""
    read = EVALS[evaluation].flags
    if "text" in read and data.get("text", ()) is None:
        return ""
    lengths = settings.get("asked") if EVALS[evaluation].uses_engine and settings.get("asked") else settings.get("lengths")
    flags = [("checkpoint", run.provenance["checkpoint"]) for run in runs]
    steps = [run.provenance.get("step") for run in runs]
    flags += [("step", step) for step in (steps if len(set(steps)) > 1 else steps[:1]) if None not in steps]
    flags += [("suite", evaluation), ("lengths", _listed(lengths))]
    for name in read:
        values = _as_list(data.get(name)) if name in DATA else [_plain(settings.get(name))]
        flags += [(name, value) for value in values if value != _listed([*NAMES])]
    flags.append(("mesh", _mesh(runs[0].provenance.get("mesh"))))
    trusts = "heldout" in read and not data.get("heldout") and data.get("trust_checkpoint_data")
    arguments = [f"--{name}={value}" for name, value in flags if value not in (None, "") and name != "compat"]
    arguments += ["--trust_checkpoint_data"] * bool(trusts)
    arguments += ["--compat"] * ("compat" in read and runs[0].compat) + ["--out=DIR"]
    return escape.label(f"python tools/evaluate.py {shlex.join(arguments)}")


def _plain(value: object) -> object:
    return _listed(value) if isinstance(value, (list, tuple)) else value


def _as_list(value: str | Sequence[str] | None) -> Sequence[str | None]:
    return [value] if value is None or isinstance(value, str) else value


def _mesh(mesh: str | None) -> str | None:
    """The flag's form of the mesh that run.json names: "context 4 x tensor 2" as "context=4,tensor=2"."""
    return mesh.replace(" x ", ",").replace(" ", "=") if mesh and MESH.fullmatch(mesh) else None


def _listed(values: object) -> str | None:
    if not isinstance(values, (list, tuple)):
        return None
    return ",".join(f"{x:g}" if isinstance(x, float) else str(x) for x in values)
