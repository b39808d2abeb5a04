"""Files by URL, opened by webdataset: a local path, `https:`, `s3:`, `gs:`, `hf:`, or `pipe:` where it is allowed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlparse


def expand(urls: str) -> list[str]:
    """The URLs that one text stands for: braces (`{0000..0127}`) and `::` as in webdataset; a pipe stays as it is."""
    if urls.startswith("pipe:"):
        return [urls]
    from_webdataset()
    from webdataset.shardlists import expand_urls

    return expand_urls(urls)


def local_path(url: str) -> Path | None:
    """The path of a local file; None for anything else."""
    scheme = urlparse(url).scheme
    if scheme == "file":
        return Path(urlparse(url).path)
    return None if scheme else Path(url)


def check_url(url: str, allow_pipe: bool) -> None:
    """Refuse what would run a shell command without leave.

    Raises:
        ValueError: for `pipe:` (also by way of GOPEN_REWRITE) unless `allow_pipe`; for a scheme that nothing opens.
    """
    gopen = from_webdataset()
    if url == "-":
        raise ValueError("'-' (standard input) cannot be read twice: give a file or a URL")
    scheme = urlparse(gopen.rewrite_url(url)).scheme
    if scheme == "pipe" and not allow_pipe:
        raise ValueError(f"{url!r} runs a shell command: allow it with --allow-pipe (allow_pipe: true in a config)")
    if scheme not in ("", "file", *gopen.gopen_schemes):
        raise ValueError(f"{url!r}: nothing opens {scheme}: here; known are {', '.join(_schemes(gopen))}")


def open_url(url: str, allow_pipe: bool = False) -> Any:
    """A stream with `read(n)` and `close()`.

    Raises:
        ValueError: as `check_url`.
        FileNotFoundError: for a local file that is not there.
    """
    check_url(url, allow_pipe)
    return from_webdataset().gopen(url, "rb")


def from_webdataset() -> Any:
    """The module `webdataset.gopen`, which also opens `s3:` here.

    Raises:
        ImportError: without the extra `imagenet`.
    """
    try:
        import webdataset  # noqa: F401
    except ImportError as error:
        raise ImportError("latent shards need webdataset: pip install 'mfm-lightning[imagenet]'") from error
    gopen = sys.modules["webdataset.gopen"]  # the package's attribute of that name is the function
    gopen.gopen_schemes.setdefault("s3", _open_s3)
    return gopen


def _open_s3(url: str, mode: str = "rb", bufsize: int = 8192) -> Any:
    """As webdataset's gs:, by the provider's own command line and without a shell."""
    gopen = from_webdataset()
    return gopen.Pipe(["aws", "s3", "cp", url, "-"], mode=mode, bufsize=bufsize, ignore_status=[141, 23])


def _schemes(gopen: Any) -> list[str]:
    return sorted(name for name in gopen.gopen_schemes if not name.startswith("__"))


def join(folder: str, name: str) -> str:
    """The URL of a file of a folder; a `pipe:` folder has `{name}` where the file's name goes.

    Raises:
        ValueError: for a pipe without it.
    """
    folder = os.fspath(folder)
    if folder.startswith("pipe:"):
        if "{name}" not in folder:
            raise ValueError(f"{folder!r} must have {{name}} where the name of a file goes")
        return folder.replace("{name}", name)
    return f"{folder.rstrip('/')}/{name}"
