"""The files of a tar that is read from a stream, and an error where it is damaged or cut off."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from typing import Any

_CHUNK = 1 << 20
SKIPPED = re.compile(r"__[^/]*__($|/)")  # names of its own, by webdataset


class _Header(tarfile.TarInfo):
    """Python's tarfile takes a damaged or missing header, but for the first, for the end of the archive: here only the
    block of zeros is, which every archive ends with."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            place = f"at byte {tar.offset:,} ({error})"
            raise tarfile.ReadError(f"neither a header nor the archive's end {place}: damaged or truncated") from error


def tar_files(stream: Any, url: str) -> Iterator[dict[str, Any]]:
    """Names and contents as webdataset's `group_by_keys` takes them, of a stream that can only be read forwards (also
    a compressed one).

    Raises:
        tarfile.TarError: saying where, if it is damaged or ends too early; also if more follows its end, since a header
            of zeros looks like one.
    """
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header) as tar:
        for member in tar:
            if member.isreg() and not SKIPPED.match(member.name):
                yield {"fname": member.name, "data": tar.extractfile(member).read(), "__url__": url}
            tar.members = []  # else all stay in memory
        while rest := tar.fileobj.read(_CHUNK):
            if rest.strip(b"\0"):
                raise tarfile.ReadError(f"more after its end at byte {tar.offset:,}: damaged, or tars in one file")
