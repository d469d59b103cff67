"""The files of a workdir that say what a run is made with: `config.json`, and `about.json` beside it."""

import contextlib
import json
import platform
from importlib import metadata
from pathlib import Path

import jax

from hybrid_attn import config, files
from hybrid_attn.evals.provenance import revision

PACKAGES = (
    "hybrid-attn", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "libtpu", "tokamax",
)  # fmt: skip


def write_config(workdir: Path, c: config.Config, start: int) -> list[str]:
    """Writes both files; different ones are renamed to NAME_until_STEP.json, those of the steps up to `start`.

    At step 0 the different ones belong to a run without checkpoints: they get names of their own, which are the returned lines.
    Process 0 does it for all.
    """
    if jax.process_index():
        return []
    contents = {"config": config.to_dict(c), "about": about(c)}
    return [note for name, values in contents.items() for note in _write(workdir / f"{name}.json", values, start)]


def _write(path: Path, values: dict, start: int) -> list[str]:
    text, notes = json.dumps(values, indent=1) + "\n", []
    older = path.with_name(f"{path.stem}_until_{start}.json")
    if path.exists() and path.read_text(errors="replace") != text:
        if start == 0:
            notes.append(f"kept         the old {path.name} as {files.set_aside(path)}")
        elif not older.exists():
            path.rename(older)
    files.write_atomically(path, text)
    return notes


def about(c: config.Config) -> dict:
    """The differences of a config to the defaults, versions of packages, the git revision and the devices."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "changes": config.changes(c),
        "versions": versions,
        "revision": revision(Path(__file__)),
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
    }
