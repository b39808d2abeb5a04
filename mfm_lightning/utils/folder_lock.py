"""One writer for a folder: a lock that dies with its owner."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

log = logging.getLogger(__name__)
LOCK = ".lock"  # in the folder


class FolderInUseError(FileExistsError):
    """Another process writes to the folder."""


class FolderLock:
    """Held by the process that writes to a folder, from `acquire` to `release` or its end, a kill included.

    It is `flock` on a file in the folder, which says who holds it. Where the file system has none, it is a file with
    the owner's process and host (`filelock.SoftFileLock`); one that a dead process of this host left is taken over.

    Args:
        folder: made where it is missing.
        what: the process does, such as "mfm fit", for the one that is refused.
    """

    def __init__(self, folder: str | Path, what: str) -> None:
        self.folder, self.what = Path(folder), what
        self._lock: BaseFileLock | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            FolderInUseError: with the owner, if another process has it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / LOCK
        try:
            lock: BaseFileLock = FileLock(path, timeout=0, fallback_to_soft=False)
            lock.acquire()
        except Timeout as error:
            raise self._in_use(path) from error
        except (NotImplementedError, OSError) as error:
            if isinstance(error, PermissionError):
                raise
            log.info("%s has no flock (%s): a file names the owner instead", self.folder, error)
            lock = SoftFileLock(path.with_name(f"{LOCK}.owner"), timeout=0)
            try:
                lock.acquire()
            except Timeout as taken:
                raise self._in_use(path.with_name(f"{LOCK}.owner")) from taken
        else:
            path.write_text(f"{self.what}, process {os.getpid()} on {socket.gethostname()}")
        self._lock = lock

    def release(self) -> None:
        """Give it back; no effect where it is not held."""
        if self._lock is not None:
            # while it is held: who waits for a file that is gone looks again
            (self.folder / LOCK).unlink(missing_ok=True)
            self._lock.release(force=True)
            self._lock = None

    def _in_use(self, path: Path) -> FolderInUseError:
        try:
            owner = " ".join(path.read_text(errors="replace").split()) or "another process"
        except OSError:
            owner = "another process"
        return FolderInUseError(
            f"{self.folder} is being written to by {owner}: wait for its end, stop it, or take another folder"
        )
