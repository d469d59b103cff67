"""A program that one process compiled is read by the next one, and a cache that cannot be written is no error."""

import os
import subprocess
import sys
from pathlib import Path

from hybrid_attn import compiled

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys
from pathlib import Path
from hybrid_attn import compiled
compiled.keep(*map(Path, sys.argv[1:]))
import jax
print(jax.jit(lambda x: 3 * x + 1)(2.0), compiled.summary())
"""


def run(*shared: Path, **variables: str) -> str:
    """What a process that compiles one program prints."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    quick = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = inherited | quick | variables
    done = subprocess.run([sys.executable, "-c", PROGRAM, *shared], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def test_a_second_process_reads_what_the_first_compiled_unless_the_cache_is_off(tmp_path):
    assert run(XDG_CACHE_HOME=str(tmp_path)) == "7.0"
    kept = sorted((tmp_path / "hybrid_attn").iterdir())
    assert run(XDG_CACHE_HOME=str(tmp_path)) == "7.0 1 of 1 programs read from the cache"
    assert run(XDG_CACHE_HOME=str(tmp_path), JAX_ENABLE_COMPILATION_CACHE="false") == "7.0"
    assert sorted((tmp_path / "hybrid_attn").iterdir()) == kept


def test_the_programs_that_were_not_used_for_the_longest_time_make_room(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "SIZE", 250)
    folder = compiled._user_folder()
    for i, age in enumerate((30, 10, 20)):
        (folder / f"{i}").write_bytes(bytes(100))
        os.utime(folder / f"{i}", (1e9 - age, 1e9 - age))
    assert compiled._user_folder() == folder
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_a_relative_directory_of_the_user_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compiled._user_folder() == tmp_path / ".cache" / "hybrid_attn"


def test_a_file_that_a_full_disk_cut_short_keeps_no_other_program_from_being_kept(tmp_path):
    folder = tmp_path / "hybrid_attn"
    folder.mkdir()
    (folder / "jit_f-0123-cache").write_bytes(bytes(100))
    assert run(XDG_CACHE_HOME=str(tmp_path)) == "7.0"
    assert run(XDG_CACHE_HOME=str(tmp_path)) == "7.0 1 of 1 programs read from the cache"


def test_programs_that_cannot_be_written_or_read_are_compiled(tmp_path):
    (tmp_path / "file").write_text("")
    assert run(XDG_CACHE_HOME=str(tmp_path / "file")) == "7.0"
    shared = tmp_path / "shared"
    assert run(shared, XDG_CACHE_HOME=str(tmp_path)) == "7.0"
    (program,) = shared.glob("*-cache")
    program.write_bytes(program.read_bytes()[:100])  # as a full disk leaves it
    assert run(shared) == "7.0"
    assert not (tmp_path / "hybrid_attn").exists()
