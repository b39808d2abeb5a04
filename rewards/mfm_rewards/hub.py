"""Where pretrained weights are: local files, or files of a Hugging Face repository.

Those are taken from its cache on this machine, and downloaded only where that is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from types import ModuleType

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_REPOSITORY = re.compile(r"^(?:hf:)?(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(?:/(?P<file>[^/].*))?$")


def find_file(path: str | Path, allow_download: bool = False, revision: str | None = None) -> Path:
    """The local path of a checkpoint.

    Args:
        path: a file; or a Hugging Face repository, `org/name` or `org/name/file` (write `hf:org/name` where a local
            folder has that name). Without a file, the repository must have one checkpoint only, or a
            `model.safetensors`.
        allow_download: download it where it is not in Hugging Face's cache on this machine.
        revision: branch, tag or commit of the repository.

    Raises:
        FileNotFoundError: if it is not there, with what was looked for and the command that fetches it.
        ImportError: for a repository, without huggingface_hub.
        ValueError: if the repository has several checkpoints.
    """
    if Path(path).is_file():
        return Path(path)
    repo, file = _repository(str(path), "checkpoint")
    if file is None and PurePosixPath(repo).suffix in SUFFIXES:
        raise FileNotFoundError(f"no checkpoint at {path}")
    hub = require_hub(str(path))

    def cached() -> Path:
        if file is not None:
            return Path(hub.hf_hub_download(repo, file, revision=revision, local_files_only=True))
        folder = Path(hub.snapshot_download(repo, revision=revision, local_files_only=True))
        return folder / _only_checkpoint([str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()], repo)

    def fetched() -> Path:
        only = file or _only_checkpoint(hub.HfApi().list_repo_files(repo, revision=revision), repo)
        return Path(hub.hf_hub_download(repo, only, revision=revision, local_files_only=False))

    # without a file's name the cache may have less than the repository
    ways = [cached] if not allow_download else [fetched] if file is None else [cached, fetched]
    return from_hub(ways, str(path), repo, [file] if file else [], "checkpoint", revision)


def find_folder(
    path: str | Path,
    needed: Sequence[str],
    wanted: Sequence[str] = (),
    allow_download: bool = False,
    revision: str | None = None,
    what: str = "model",
) -> Path:
    """The local folder of a pretrained model or tokenizer, as the `from_pretrained` functions read one.

    Args:
        path: a folder, or a repository `org/name` (also `hf:org/name`).
        needed: files that must be there; `"a|b"`: one of them.
        wanted: patterns of further files that are downloaded with them.
        allow_download: download it where it is not in Hugging Face's cache on this machine.
        revision: branch, tag or commit of the repository.
        what: how errors call it.

    Raises:
        FileNotFoundError: if it or a file is not there, with what was looked for and the command that fetches it.
        ImportError: for a repository, without huggingface_hub.
    """
    if Path(path).is_dir():
        folder = Path(path)
        if missing := _missing(folder, needed):
            raise FileNotFoundError(f"{folder} has no {' and no '.join(missing)}: not the folder of a {what}")
        return folder
    repo, _ = _repository(str(path), what)
    hub = require_hub(str(path))
    first = [alternatives.split("|")[0] for alternatives in needed]

    def cached() -> Path:
        folder = Path(hub.snapshot_download(repo, revision=revision, local_files_only=True))
        if missing := _missing(folder, needed):
            raise FileNotFoundError(f"{folder} has no {' and no '.join(missing)}")
        return folder

    def fetched() -> Path:
        files = hub.HfApi().list_repo_files(repo, revision=revision)
        chosen = [next((f for f in a.split("|") if f in files), a.split("|")[0]) for a in needed]
        return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=[*chosen, *wanted]))

    ways = [cached, fetched] if allow_download else [cached]
    return from_hub(ways, str(path), repo, list(dict.fromkeys([*first, *wanted])), what, revision)


def _missing(folder: Path, needed: Sequence[str]) -> list[str]:
    return [a.replace("|", " or ") for a in needed if not any((folder / name).is_file() for name in a.split("|"))]


def _repository(text: str, what: str) -> tuple[str, str | None]:
    """The repository and the file in it that a text names."""
    match = _REPOSITORY.match(text)
    local = not text.startswith("hf:") and (Path(text).is_absolute() or Path(text.split("/")[0]).exists())
    if match is None or local:
        raise FileNotFoundError(f"no {what} at {text}")
    return match["repo"], match["file"]


def require_hub(text: str) -> ModuleType:
    """huggingface_hub, wanted for `text`; ImportError without it."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(f"{text}: huggingface_hub is missing: pip install huggingface-hub") from error
    return huggingface_hub


def from_hub(
    ways: Sequence[Callable[[], Path]], text: str, repo: str, files: list[str], what: str, revision: str | None
) -> Path:
    """What the first of the ways finds.

    Args:
        ways: functions that each give a path, or raise.
        text: what was asked for.
        repo: the repository, "org/name".
        files: of the repository `repo`.
        what: how errors call it.
        revision: branch, tag or commit of it.

    Raises:
        FileNotFoundError: if all fail, with what was looked for, the reason, and the command that fetches it.
    """
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    failure: Exception | None = None
    for way in ways:
        try:
            return way()
        except HFValidationError as error:
            raise FileNotFoundError(f"no {what} at {text}, which is no name of a repository either: {error}") from error
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            failure = error
    # other failures than an empty cache (a failed download, no permission) are quoted
    reason = "" if isinstance(failure, LocalEntryNotFoundError) else f" ({str(failure).strip().splitlines()[0]})"
    named = f"{', '.join(files)} of {repo}" if files else f"a {what} of {repo}"
    at = f" --revision {revision}" if revision else ""
    raise FileNotFoundError(
        f"no file at {text}, and {named} is not in Hugging Face's cache on this machine, {HF_HUB_CACHE}{reason}. "
        f"`hf download {repo}{''.join(f' {f}' for f in files)}{at}` fetches it, and so does the job itself where that "
        "is allowed (allow_download: true, --allow-download)"
    ) from failure


def _only_checkpoint(files: list[str], repo: str) -> str:
    found = sorted(f for f in files if PurePosixPath(f).suffix in SUFFIXES)
    if "model.safetensors" in found:
        return "model.safetensors"
    if not found:
        raise FileNotFoundError(f"{repo} has no checkpoint ({', '.join(SUFFIXES)}) among {sorted(files)[:5]}")
    if len(found) > 1:
        raise ValueError(f"{repo} has {len(found)} checkpoints, {found[:5]}: name one, as {repo}/{found[0]}")
    return found[0]
