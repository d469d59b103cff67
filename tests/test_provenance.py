"""A report says of which revision the program was that made it, and whether its files were changed."""

import subprocess

from hybrid_attn.evals.provenance import revision


def git(folder, *arguments):
    author = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    return subprocess.run(["git", *author, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def test_the_revision_is_of_the_file_and_says_what_was_changed(tmp_path):
    ours, other = tmp_path / "ours.py", tmp_path / "other.py"
    for path in (ours, other):
        path.touch()
    assert revision(ours) == "not in a git repository"
    git(tmp_path, "init")
    git(tmp_path, "add", "ours.py")
    git(tmp_path, "commit", "-m", "first")
    git(tmp_path, "tag", "v1")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert revision(ours) == head
    assert revision(other) == "not in a git repository"  # which has only the file beside it
    (tmp_path / "README.md").write_text("one page")
    git(tmp_path, "add", "README.md")
    git(tmp_path, "commit", "-m", "second")
    head = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "README.md").write_text("another page, which no run depends on")
    assert revision(ours) == head
    ours.write_text("changed")
    assert revision(ours) == f"{head}-dirty"
