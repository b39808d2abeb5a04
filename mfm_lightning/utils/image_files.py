"""Which files are images or tars, by their endings, and what of a folder is left out: counted, and named in a line."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mfm_lightning.utils.decoding import image_endings
from mfm_lightning.utils.sample_folder import OWN_FILES

log = logging.getLogger(__name__)
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
UNREAD_TARS = (".tar.zst", ".tzst", ".tar.lz4", ".tar.z", ".tar.lz", ".tar.lzma", ".tar.br")
_JUNK = {"thumbs.db", "desktop.ini", "__macosx"}  # of operating systems, as are names that begin with a dot
_SHOWN = 3


def is_junk(name: str) -> bool:
    """Whether the name of a file or folder is hidden or an operating system's own: `.DS_Store`, `._a.png`."""
    return name.startswith(".") or name.lower() in _JUNK


def is_image(name: str) -> bool:
    """Whether a file has the ending of an image."""
    return os.path.splitext(name)[1].lower() in image_endings()


def is_tar(name: str) -> bool:
    """Whether a file has the ending of a tar, compressed or not; see `check_tar`."""
    return name.lower().endswith((*TARS, *UNREAD_TARS))


def check_tar(name: str) -> None:
    """Raise ValueError for a tar that is compressed by other than gzip, bzip2 or xz, which are read."""
    if name.lower().endswith(UNREAD_TARS):
        raise ValueError(f"{name}: a tar of this compression is not read: unpack it to .tar, or give .tar.gz")


@dataclass
class LeftOut:
    """Files that were passed over, counted by what they are, with the first few by name."""

    counts: Counter[str] = field(default_factory=Counter)
    names: list[str] = field(default_factory=list)

    def add(self, kind: str, name: str) -> None:
        self.counts[kind] += 1
        if len(self.names) < _SHOWN:
            self.names.append(name)

    def add_file(self, name: str, tar: str = "") -> None:
        """A file that is no image, by its ending, of a folder or of a tar; nothing for our own notes beside samples."""
        if os.path.basename(name) not in OWN_FILES:
            kind = os.path.splitext(name)[1].lower() or "without ending"
            self.add(kind, f"{os.path.basename(tar)}:{name}" if tar else name)

    def line(self) -> str:
        """Such as "4 files left out: 3 .txt, 1 .heic (a.txt, b.txt, c.txt, ...)"; "" for none."""
        total = sum(self.counts.values())
        if not total:
            return ""
        kinds = ", ".join(f"{number} {kind}" for kind, number in self.counts.most_common())
        more = ", ..." if total > len(self.names) else ""
        return f"{total} files left out: {kinds} ({', '.join(self.names)}{more})"

    def report(self, where: str | Path) -> None:
        """Say it, if there are any."""
        if line := self.line():
            log.warning("%s: %s", where, line)


def find_files(
    folder: Path, deep: bool = True, others: list[str] | None = None
) -> tuple[list[Path], list[Path], LeftOut]:
    """Images and readable tars of a folder, sorted, and what else is there.

    Args:
        deep: look into its folders, too; without, their images count as left out.
        others: where names of all other files are put, of a caller that reads some; they do not count as left out here.

    Raises:
        FileNotFoundError, NotADirectoryError: if it is not there, or is a file.
        ValueError: for a tar that cannot be read.
    """
    if not folder.exists():
        raise FileNotFoundError(f"no folder {folder}: expected one of images")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: expected a folder of images")
    images, tars, left_out = [], [], LeftOut()
    for entry in walk(folder):
        path, name = Path(entry.path), entry.path[len(os.path.join(folder, "")) :]
        if not entry.is_file():  # a FIFO or a device, at which reading would wait for ever
            left_out.add("not plain files", name)
        elif is_image(name) and not deep and path.parent != folder:
            left_out.add("images in its folders", name)
        elif is_image(name):
            images.append(path)
        elif is_tar(name):
            check_tar(str(path))
            tars.append(path)
        elif others is not None:
            others.append(name)
        else:
            left_out.add_file(name)
    return sorted(images), sorted(tars), left_out


def walk(folder: str | Path, above: tuple[str, ...] = ()) -> Iterator[os.DirEntry[str]]:
    """All that is in a folder and its folders but folders and `is_junk`, in the order of names; links are followed,
    but for those to where they are in."""
    here = os.path.realpath(folder)
    if here in above:
        return
    with os.scandir(folder) as entries:
        found = sorted((entry for entry in entries if not is_junk(entry.name)), key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir():
            yield from walk(entry.path, (*above, here))
        else:
            yield entry
