"""Where a checkpoint is: a local file, or one of a Hugging Face repository, offline unless a download is allowed."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt")
_REPOSITORY = re.compile(r"^(?:hf:)?(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(?:/(?P<file>[^/].*))?$")


def find_file(path: str | Path, allow_download: bool = False, revision: str | None = None) -> Path:
    """The local path of a checkpoint.

    Args:
        path: a file; or `org/name` or `org/name/file`, also as `hf:org/name...` where a local folder has that name: a
            repository, in Hugging Face's cache on this machine. Without a file, it must have one checkpoint only, or a
            `model.safetensors`.
        allow_download: fetch it where it is not in the cache.
        revision: branch, tag or commit of the repository.

    Raises:
        FileNotFoundError: if it is not there, with what was looked for and the command that fetches it.
        ImportError: for a repository, without huggingface_hub.
        ValueError: if the repository has several checkpoints.
    """
    text = str(path)
    if Path(path).is_file():
        return Path(path)
    match = _REPOSITORY.match(text)
    local = not text.startswith("hf:") and (Path(text).is_absolute() or Path(text.split("/")[0]).exists())
    if match is None or local or (match["file"] is None and PurePosixPath(text).suffix in SUFFIXES):
        raise FileNotFoundError(f"no checkpoint at {path}")
    return _from_hub(match["repo"], match["file"], allow_download, revision, text)


def _from_hub(repo: str, file: str | None, allow_download: bool, revision: str | None, text: str) -> Path:
    try:
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise ImportError(f"{text}: huggingface_hub is missing: pip install 'mfm-lightning[imagenet]'") from error
    try:
        if file is None and allow_download:
            file = _only_checkpoint(HfApi().list_repo_files(repo, revision=revision), repo)
        elif file is None:
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
            cached = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
            return folder / _only_checkpoint(cached, repo)
        return Path(hf_hub_download(repo, file, revision=revision, local_files_only=not allow_download))
    except HFValidationError as error:
        raise FileNotFoundError(f"no checkpoint at {text}, which is no name of a repository either: {error}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        what = f"{file} of {repo}" if file else f"a checkpoint of {repo}"
        at = f" --revision {revision}" if revision else ""
        reason = f"; the download failed: {str(error).strip().splitlines()[0]}" if allow_download else ""
        raise FileNotFoundError(
            f"no file at {text}, and {what} is not in Hugging Face's cache on this machine{reason}. "
            f"`hf download {repo}{f' {file}' if file else ''}{at}` fetches it, or allow_download (--allow-download)"
        ) from error


def _only_checkpoint(files: list[str], repo: str) -> str:
    found = sorted(f for f in files if PurePosixPath(f).suffix in SUFFIXES)
    if "model.safetensors" in found:
        return "model.safetensors"
    if not found:
        raise FileNotFoundError(f"{repo} has no checkpoint ({', '.join(SUFFIXES)}) among {sorted(files)[:5]}")
    if len(found) > 1:
        raise ValueError(f"{repo} has {len(found)} checkpoints, {found[:5]}: name one, as {repo}/{found[0]}")
    return found[0]
