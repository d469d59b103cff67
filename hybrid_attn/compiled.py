"""Programs that are kept from one start to the next, so that only the first start compiles: JAX's persistent compilation cache.

By default they are in the user's cache directory: $XDG_CACHE_HOME/hybrid_attn, or ~/.cache/hybrid_attn. JAX's own variables
hold as in every program: JAX_COMPILATION_CACHE_DIR names another directory, JAX_ENABLE_COMPILATION_CACHE=false switches the
cache off. The key of a program has its instructions, the flags of XLA, the version of jaxlib and the kind of processor.
"""

import os
import warnings
from pathlib import Path

import jax

SIZE = 2 * 2**30  # bytes; the least recently used programs make room. Those of a small run take 1 MB
SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0.05,  # JAX leaves out what compiles in a second: a checkpoint needs ten such
    "jax_persistent_cache_enable_xla_caches": "none",  # XLA's own files for GPUs: a full disk would end the run
}
REQUESTS, READ = (f"/jax/compilation_cache/{name}" for name in ("compile_requests_use_cache", "cache_hits"))
_counts = {REQUESTS: 0, READ: 0}


def keep(shared: Path | None = None) -> None:
    """Keeps the programs that this process compiles; without a directory that can be written it compiles as before.

    `shared` is a directory that all processes of a run see, in which programs are then kept. Process 0 alone writes; if it read
    programs that the others do not see, compilers that work together would wait for each other.
    """
    jax.monitoring.register_event_listener(_count)
    if jax.config.jax_compilation_cache_dir is not None or not jax.config.jax_enable_compilation_cache:
        return
    if (folder := shared or _user_folder()) is None:
        return
    # What cannot be read is compiled and what cannot be written is not kept: jax warns of each program, which nobody needs.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    settings = SETTINGS | {"jax_compilation_cache_dir": str(folder)}
    if shared is None:  # for processes that share it, the lock of a cache of bounded size could time out in some of them
        settings["jax_compilation_cache_max_size"] = SIZE
    for name, value in settings.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)


def summary() -> str:
    """How many programs were read and how many there are, for a log; empty if none was read."""
    return f"{_counts[READ]} of {_counts[REQUESTS]} programs read from the cache" if _counts[READ] else ""


def _user_folder() -> Path | None:
    """The directory of this user's programs; None where there is no home or it cannot be written."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if not base.is_absolute():
        return None
    try:
        (base / "hybrid_attn").mkdir(mode=0o700, parents=True, exist_ok=True)  # who writes there can run code here
    except OSError:
        return None
    return base / "hybrid_attn" if os.access(base / "hybrid_attn", os.W_OK) else None


def _count(event: str, **_) -> None:
    if event in _counts:
        _counts[event] += 1
