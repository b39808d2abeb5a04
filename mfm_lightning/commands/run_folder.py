"""The folder that `mfm fit` writes a run to: for one run at a time, and none that is there is lost."""

from __future__ import annotations

from pathlib import Path

from mfm_lightning.utils.atomic import mend
from mfm_lightning.utils.folder_lock import FolderLock


class RunFolder:
    """A run's folder.

    Args:
        path: the trainer's `default_root_dir`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoint = self.path / "last.ckpt"
        self.lock = FolderLock(self.path, "mfm fit")

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
