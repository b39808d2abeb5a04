"""The folder that `mfm fit` and `predict` write a run to: for one run at a time, and none that is there is lost."""

from __future__ import annotations

import logging
from pathlib import Path

from mfm_lightning.utils.atomic import mend, remove
from mfm_lightning.utils.folder_lock import FolderLock

log = logging.getLogger(__name__)


class RunFolder:
    """A run's folder.

    Args:
        path: the trainer's `default_root_dir`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoint = self.path / "last.ckpt"
        self.samples = self.path / "predict"
        self.lock = FolderLock(self.path, "mfm fit")
        self._samples_lock = FolderLock(self.samples, "mfm predict")

    def lock_samples(self) -> None:
        """Take the lock of what `mfm predict` writes; raises FolderInUseError if another process has it."""
        self._samples_lock.acquire()

    def release(self) -> None:
        """Give back the locks that are held."""
        self.lock.release()
        self._samples_lock.release()

    def remove_samples(self) -> None:
        """Delete what `mfm predict` has written; its lock is held."""
        others = [path for path in self.samples.iterdir() if path.name[0] != "."]
        for path in others:
            remove(path)
        if others:
            log.info("%s: what was there is removed (--overwrite)", self.samples)

    def goes_on(self, resumed: str | Path | None) -> bool:
        """Whether the run goes on from this folder's own `last.ckpt`.

        Args:
            resumed: what `--ckpt_path` says.
        """
        if resumed is None or not self.checkpoint.exists():
            return False
        return resumed in ("last", "hpc") or (Path(resumed).exists() and self.checkpoint.samefile(resumed))

    def refuse_overwriting(self, resumed: str | Path | None) -> None:
        """Refuse a run that would write over the `last.ckpt` of another one.

        Args:
            resumed: what `--ckpt_path` says: the run goes on from it.

        Raises:
            FileExistsError: if it begins anew, or goes on from elsewhere, and there is a `last.ckpt`.
        """
        mend(self.checkpoint)
        if not self.checkpoint.exists() or self.goes_on(resumed):
            return
        begins = "begins anew" if resumed is None else f"goes on from {resumed}"
        raise FileExistsError(
            f"{self.checkpoint} is of a run that was trained so far, and this one {begins}: go on from it by "
            "--ckpt_path last, write over it by --overwrite, or take another folder by --trainer.default_root_dir"
        )
