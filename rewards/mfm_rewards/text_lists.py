"""Lists of names in text files, in the forms that they come in: lines, numbered lines, WordNet's synsets, JSON, and
Python dictionaries."""

from __future__ import annotations

import ast
import codecs
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
_WORDNET = re.compile(r"(n\d{8})(?:[\s,:]+(.*))?")
_NUMBERED = re.compile(r"(\d+)\s*[:,\t]\s*(\S.*)")
_SPACED = re.compile(r"(\d+)\s+(\S.*)")  # also names that begin with a number
_LABEL_LAST = re.compile(r"(\S.*?)[\s,:]+(\d+)")
_QUOTED = re.compile(r"(['\"])(?:(?!\1).)*\1")
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # UTF-32 begins or ends like one of them


class TextListError(ValueError):
    """A file that holds no list of names, or one that could be read in two ways."""


@dataclass(frozen=True)
class Entry:
    """A class: its name, and its WordNet id ("n01440764") where the file gives one."""

    name: str
    wordnet: str | None = None


def read_text(path: str | Path) -> str:
    """A file's text, in UTF-8 with or without a byte-order mark.

    Raises:
        FileNotFoundError: if there is no such file.
        TextListError: if it is in another encoding.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    content = path.read_bytes()
    if content.startswith(_UTF16) or b"\0" in content:
        raise TextListError(f"{path} is UTF-16 or no text: expected UTF-8, save it as that")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise TextListError(f"{path} is no UTF-8 (line {line}): save it as UTF-8") from error


def lines_of(text: str) -> list[str]:
    """Its lines, ended as on any system; not at U+2028, which may be in a name or a prompt."""
    return re.split(r"\r\n?|\n", text)


def read_object(path: str | Path) -> Any:
    """A file's JSON, or the dictionary or list of Python that it holds; no key may be there twice.

    Raises:
        FileNotFoundError: if there is no such file.
        TextListError: if it is neither.
    """
    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        try:
            return _python(text)
        except (SyntaxError, ValueError, MemoryError, RecursionError) as other:
            if isinstance(other, TextListError):
                raise TextListError(f"{path}: {other}") from error
            raise TextListError(f"{path} is no JSON, and no dictionary of Python: {error}") from error
    except (TextListError, RecursionError) as error:
        raise TextListError(f"{path}: {error}") from error


def read_list(path: str | Path) -> list[Entry]:
    """Classes by label.

    Read are: one name a line (lines that begin with # are comments); "n01440764 tench, Tinca tinca", of which the first
    of the synonyms is the name; "0: tench"; in JSON or as Python writes it a list of names, an object of names by label
    (`{"0": "tench"}`), of pairs by label (`{"0": ["n01440764", "tench"]}`), or of labels by name (`{"tench": 0}`).

    Raises:
        FileNotFoundError: if there is no such file.
        TextListError: for anything else; for labels that are not 0, 1, ..., each once; for an empty line between names.
    """
    text = read_text(path)
    if Path(path).suffix.lower() == ".json" or text.lstrip()[:1] in ("{", "["):
        entries = _of_object(read_object(path), path)
    else:
        entries = _of_lines(text, path)
        quoted = [entry.name for entry in entries if _QUOTED.fullmatch(entry.name)]
        if quoted and 2 * len(quoted) >= len(entries):
            raise TextListError(f"{path}: {quoted[0]} is in quotes, which would belong to the name: leave them out")
        if quoted:
            log.info("%s: quotes of %s belong to the name", path, ", ".join(quoted[:5]))
        if all(entry.name.startswith("- ") for entry in entries) and entries:
            raise TextListError(f"{path} is a list of YAML: leave the dashes out, or give a JSON list")
    if not entries or not all(entry.name for entry in entries):
        raise TextListError(f"{path} holds no names, or an empty one: expected one a line, or a JSON list of strings")
    return entries


def _of_lines(text: str, path: str | Path) -> list[Entry]:
    every = lines_of(text)
    lines = {i: line.strip() for i, line in enumerate(every, 1) if not line.startswith("#")}
    names = {i: line for i, line in lines.items() if line}
    begun = min(names, default=0) if len(lines) < len(every) else 1  # empty lines may follow a comment
    if gap := next((i for i, line in lines.items() if not line and begun <= i < max(names, default=0)), None):
        raise TextListError(
            f"{path}: line {gap} is empty, and the labels of all names after it would be wrong: fill it"
        )
    if all_wordnet := _matches(_WORDNET, names, path):
        entries = [Entry(_first_synonym(match[2] or match[1]), match[1]) for match in all_wordnet]
        if any("," in (match[2] or "") for match in all_wordnet):
            log.info("%s: of the synonyms of a WordNet id the first is taken, such as %r", path, entries[0].name)
        return entries
    if numbered := _matches(_NUMBERED, names, path):
        return _by_label([(match[1], Entry(match[2])) for match in numbered], path)
    for form, label, name in ((_SPACED, 1, 2), (_LABEL_LAST, 2, 1)):
        found = [match for line in names.values() if (match := form.fullmatch(line))]
        # names may begin or end with numbers, such as years; these are labels where they count up
        if len(found) == len(names) and _counts_up([int(match[label]) for match in found]):
            return _by_label([(match[label], Entry(match[name])) for match in found], path)
    return [Entry(line) for line in names.values()]


def _counts_up(numbers: list[int]) -> bool:
    return len(set(numbers)) == len(numbers) > 1 and max(numbers) < 2 * len(numbers)


def _matches(form: re.Pattern[str], names: dict[int, str], path: str | Path) -> list[re.Match[str]]:
    """Of all lines; of none where fewer than half are of a form, else none may be of another."""
    found = {i: form.fullmatch(line) for i, line in names.items()}
    matches = [match for match in found.values() if match]
    if 2 * len(matches) < len(found):
        return []
    if other := next((i for i, match in found.items() if match is None), None):
        raise TextListError(
            f"{path}: line {other} ({names[other]!r}) is not of the form of the others: {matches[0][0]!r}"
        )
    return matches


def _of_object(content: Any, path: str | Path) -> list[Entry]:
    if isinstance(content, list):
        return [_entry(item, path) for item in content]
    if not isinstance(content, dict):
        raise TextListError(f"{path} is no list of names, and no object of names by label 0, 1, ...")
    if all(isinstance(label, int) and not isinstance(label, bool) for label in content.values()):
        return _by_label([(label, Entry(str(name))) for name, label in content.items()], path)
    return _by_label([(label, _entry(item, path)) for label, item in content.items()], path)


def _entry(item: Any, path: str | Path) -> Entry:
    if isinstance(item, str):
        return Entry(item.strip())
    pair = isinstance(item, list | tuple) and len(item) == 2 and all(isinstance(part, str) for part in item)
    if pair and _WORDNET.fullmatch(item[0]):
        return Entry(item[1].strip(), item[0])
    raise TextListError(f"{path}: {item!r} is no name: expected a string, or a WordNet id and a name")


def _by_label(pairs: list[tuple[Any, Entry]], path: str | Path) -> list[Entry]:
    try:
        labels = {int(label): entry for label, entry in pairs}
    except (TypeError, ValueError) as error:
        raise TextListError(f"{path}: labels must be 0..{len(pairs) - 1}, each once: {error}") from error
    if sorted(labels) != list(range(len(pairs))):
        found = f"{min(labels)}..{max(labels)}, {len(labels)} of them" if labels else "none"
        raise TextListError(f"{path}: labels must be 0..{len(pairs) - 1}, each once (found {found})")
    return [labels[i] for i in range(len(pairs))]


def _first_synonym(names: str) -> str:
    return names.split(",")[0].strip()


def _once(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise TextListError(f"{key!r} is there twice")
        found[key] = value
    return found


def _python(text: str) -> Any:
    """A literal of Python; not `ast.literal_eval`, which lets the last of equal keys win."""
    node = ast.parse(text.strip(), mode="eval").body
    if isinstance(node, ast.Dict):
        keys = [None if key is None else ast.literal_eval(key) for key in node.keys]
        return _once(zip(keys, map(ast.literal_eval, node.values), strict=True))
    return ast.literal_eval(node)
