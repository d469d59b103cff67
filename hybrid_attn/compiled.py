"""Programs that are kept from one start to the next, so that only the first start compiles: JAX's persistent compilation cache.

By default they are in the user's cache directory: $XDG_CACHE_HOME/hybrid_attn, or ~/.cache/hybrid_attn. JAX's own variables
hold as in every program: JAX_COMPILATION_CACHE_DIR names another directory, JAX_ENABLE_COMPILATION_CACHE=false switches the
cache off. The key of a program has its instructions, the flags of XLA, the version of jaxlib and the kind of processor.
"""

import os
import warnings
from pathlib import Path

import jax

# Bytes of the user's directory: programs that were not used for the longest time go first. Those of a small run take 1 MB.
# JAX's own bound takes a lock for every program, and one file that a full disk cut short ends all writing.
SIZE = 2 * 2**30
SETTINGS = {
    # By default JAX keeps what takes a second to compile, and not the many small programs of a checkpoint.
    "jax_persistent_cache_min_compile_time_secs": 0.05,
    "jax_persistent_cache_enable_xla_caches": "none",  # XLA's own files for GPUs: a full disk would end the run
}
REQUESTS, READ = (f"/jax/compilation_cache/{name}" for name in ("compile_requests_use_cache", "cache_hits"))
_counts = {REQUESTS: 0, READ: 0}


def keep(shared: Path | None = None) -> None:
    """Keeps the programs that this process compiles; without a directory that can be written it compiles as before.

    `shared` is a directory that all processes of a run see, in which programs are then kept. Process 0 alone writes. All read
    the same programs: a process that compiled while another did not could wait for it without end.
    """
    jax.monitoring.register_event_listener(_count)
    if not jax.config.jax_enable_compilation_cache:
        return
    settings = dict(SETTINGS)
    if jax.config.jax_compilation_cache_dir is None:
        if (folder := shared or _user_folder()) is None:
            return
        settings["jax_compilation_cache_dir"] = str(folder)
    # What cannot be read is compiled and what cannot be written is not kept: jax warns of each program, which nobody needs.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    for name, value in settings.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)


def summary() -> str:
    """How many programs were read and how many there are, for a log; empty if none was read."""
    return f"{_counts[READ]} of {_counts[REQUESTS]} programs read from the cache" if _counts[READ] else ""


def _user_folder() -> Path | None:
    """The directory of this user's programs, with at most `SIZE` bytes; None where it cannot be written."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        base = Path(os.path.expanduser("~/.cache"))
    folder = base / "hybrid_attn"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # who writes there can run code here
        _remove_oldest(folder)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def _remove_oldest(folder: Path) -> None:
    """Removes the files that were used last the longest ago, until the rest have `SIZE` bytes."""
    files = [(max(stat.st_atime, stat.st_mtime), stat.st_size, path) for path in folder.iterdir() if (stat := path.stat())]
    total = 0
    for _, size, path in sorted(files, reverse=True):
        total += size
        if total > SIZE:
            path.unlink(missing_ok=True)  # another process may do the same


def _count(event: str, **_) -> None:
    if event in _counts:
        _counts[event] += 1
