"""Which commit of a git repository a folder or a file is of."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit(folder: str | Path) -> str:
    """The short hash of the commit that is checked out in a folder's repository, with a word where files that git
    tracks were changed since, such as "1a2b3c4 with changes"; empty outside a repository, and without git."""
    try:
        found = _git(folder, "rev-parse", "--short", "HEAD")
        changed = _git(folder, "status", "--porcelain", "-uno")
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{found}{' with changes' if changed else ''}"


def commit_of(file: str | Path) -> str:
    """`commit` of the repository that tracks a file; empty for one that is only installed below a repository, as in its
    `.venv`."""
    file = Path(file).resolve()
    try:
        _git(file.parent, "ls-files", "--error-unmatch", file.name)
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit(file.parent)


def _git(folder: str | Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=5, check=True)
    return done.stdout.strip()
