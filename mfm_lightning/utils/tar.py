"""The files of a tar that is read from a stream, and an error where it is damaged or cut off."""

from __future__ import annotations

import re
import tarfile as tars
from collections.abc import Iterator
from typing import Any

from mfm_lightning.utils.image_files import is_junk

_CHUNK = 1 << 20
SKIPPED = re.compile(r"__[^/]*__($|/)")  # names of its own, by webdataset


class _Header(tars.TarInfo):
    """Python's tarfile takes a damaged or missing header, but for the first, for the end of the archive: here only the
    block of zeros is, which every archive ends with."""

    @classmethod
    def fromtarfile(cls, tarfile: tars.TarFile) -> _Header:
        try:
            return super().fromtarfile(tarfile)
        except tars.EOFHeaderError:  # pyright: ignore[reportAttributeAccessIssue] # typeshed leaves it out
            raise
        except tars.HeaderError as error:
            place = f"at byte {tarfile.offset:,} ({error})"
            raise tars.ReadError(f"neither a header nor the archive's end {place}: damaged or truncated") from error


def tar_files(stream: Any, url: str) -> Iterator[dict[str, Any]]:
    """Names and contents as webdataset's `group_by_keys` takes them, of a stream that can only be read forwards (also
    a compressed one). Hidden files and those of operating systems are passed over.

    Raises:
        tarfile.TarError: saying where, if it is damaged or ends too early; also if more follows its end, since a header
            of zeros looks like one.
    """
    with tars.open(fileobj=stream, mode="r|*", tarinfo=_Header) as tar:
        for member in tar:
            parts = [part for part in member.name.split("/") if part not in (".", "..")]
            passed = member.isdir() or SKIPPED.match(member.name) or any(map(is_junk, parts))
            if not passed and not member.isreg():
                raise tars.ReadError(
                    f"{member.name} is a link or device, not a file: pack it with tar -h --hard-dereference"
                )
            if not passed and (content := tar.extractfile(member)) is not None:
                yield {"fname": member.name, "data": content.read(), "__url__": url}
            # else all stay in memory; typeshed leaves the list out
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
        while rest := tar.fileobj.read(_CHUNK):
            if rest.strip(b"\0"):
                raise tars.ReadError(f"more after its end at byte {tar.offset:,}: damaged, or tars in one file")
