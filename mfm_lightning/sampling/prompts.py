"""Prompts from files, with their seeds and further columns."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mfm_lightning.sampling import prompt_sets
from mfm_rewards.text_lists import lines_of, read_text

log = logging.getLogger(__name__)
SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet")
_QUOTED = re.compile(r'".*"')


@dataclass(frozen=True)
class Prompt:
    """One line of a file.

    Attributes:
        text: what is to be seen.
        seed: of its images' noise, where the file says one.
        more: the line's other columns, as they are.
    """

    text: str
    seed: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)


def read_prompts(path: str | Path, column: str = "prompt") -> list[Prompt]:
    """The prompts of a file, or of a named set.

    `.txt` has one a line (empty lines are left out); `.json` a list of texts (HPDv2) or objects; `.jsonl` an object a
    line; `.csv`, `.tsv` (PartiPrompts) and `.parquet` a row each. A column `seed`, where there is one, is the seed of a
    prompt's images. A name such as `geneval`, or `compbench/color` for a part, is a set of
    `mfm_lightning.sampling.prompt_sets.SETS`; a file of that path comes first. Prompts of a set with parts have the
    part as their column `category`.

    Args:
        column: of the text, whatever case; a set knows its own.

    Raises:
        FileNotFoundError: if it is not there; for a set that has to be fetched, with the command.
        ValueError: for another kind of file, no prompts, a row without a text, a seed that is no whole number, or a
            part that a set does not have.
        ImportError: for parquet, without pandas and pyarrow.
    """
    text = Path(path).as_posix()
    if not Path(path).is_file() and text.split("/")[0] in prompt_sets.SETS and not Path(path).suffix:
        return _of_set(text)
    return _of_file(Path(path), column)


def _of_set(text: str) -> list[Prompt]:
    name, part = prompt_sets.split_name(text)
    chosen, found = prompt_sets.SETS[name], []
    for path in prompt_sets.files_of(text):
        for prompt in _of_file(path, chosen.column):
            more = {**prompt.more, "category": path.stem} if chosen.parts else prompt.more
            found.append(Prompt(prompt.text, prompt.seed, more))
    published = chosen.count // len(chosen.parts) if part else chosen.count
    if len(found) != published:
        log.warning("prompt set %s has %d prompts here, and %d where it was published", text, len(found), published)
    return found


def _of_file(path: Path, column: str) -> list[Prompt]:
    if not path.is_file():
        meant = prompt_sets.nearest_set(path.as_posix())
        hint = f"; did you mean the prompt set {meant}?" if meant else ""
        raise FileNotFoundError(
            f"no prompts at {path}: expected a file of {', '.join(SUFFIXES)}, or a prompt set "
            f"({', '.join(prompt_sets.SETS)}){hint}"
        )
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: prompts are read from {', '.join(SUFFIXES)}")
    if path.suffix == ".txt":
        texts = lines_of(read_text(path))
        found = [Prompt(text.strip()) for text in texts if text.strip()]
    else:
        found = [_prompt(row, column, f"{path}, row {number}") for number, row in read_rows(path, column)]
    if not found:
        raise ValueError(f"{path} has no prompts")
    return found


def read_rows(path: Path, column: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows of a file by column, with their numbers from 1 on: .jsonl, .json, .parquet, .csv or .tsv. Texts of a JSON
    list are in `column`. Raises as `read_prompts`."""
    if path.suffix == ".jsonl":
        for number, line in enumerate(lines_of(read_text(path)), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, row {number}: no JSON ({error})") from error
            if not isinstance(row, Mapping):
                raise ValueError(f"{path}, row {number}: a {type(row).__name__}, expected an object")
            yield number, row
    elif path.suffix == ".json":
        try:
            rows = json.loads(read_text(path))
        except ValueError as error:
            raise ValueError(f"{path}: no JSON ({error})") from error
        if not isinstance(rows, list):
            raise ValueError(f"{path}: a {type(rows).__name__}, expected a list of texts or objects")
        for number, row in enumerate(rows, 1):
            if not isinstance(row, str | Mapping):
                raise ValueError(f"{path}, row {number}: a {type(row).__name__}, expected a text or an object")
            yield number, {column: row} if isinstance(row, str) else row
    elif path.suffix == ".parquet":
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                f"{path}: parquet needs pandas and pyarrow: pip install 'mfm-lightning[datasets]'"
            ) from error
        yield from enumerate(pandas.read_parquet(path).to_dict("records"), 1)
    else:
        # PartiPrompts has quotes as they are, and no tabs in its texts
        how: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
        number, quoted = 0, 0
        try:
            rows = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True, **how)
            for number, row in enumerate(rows, 1):
                if None in row:
                    raise ValueError(
                        f"{path}, row {number}: more fields than columns, from {str(row[None])[:80]}: "
                        "quote a text with commas in it"
                    )
                quoted += path.suffix == ".tsv" and any(_QUOTED.fullmatch(text or "") for text in row.values())
                yield number, row
        except csv.Error as error:
            why = {
                "unexpected end of data": "a quote has no end",
                "',' expected after '\"'": "something follows a closing quote",
            }.get(str(error), str(error))
            raise ValueError(
                f"{path}, row {number + 1}: no CSV, {why}; a quote within a text is doubled, the text in quotes"
            ) from error
        if quoted:
            log.info("%s: %d rows have a text in quotes; in .tsv they belong to the text", path, quoted)


def _prompt(row: Mapping[str, Any], column: str, where: str) -> Prompt:
    name = next((key for key in row if key is not None and key.lower() == column.lower()), None)
    if name is None:
        raise ValueError(f"{where}: no column {column!r}, only {', '.join(map(str, row))}")
    text = row[name]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: {name} is {text!r}, expected a text")
    seed = next((key for key in row if key.lower() == "seed"), None)
    more = {key: value for key, value in row.items() if key not in (name, seed)}
    return Prompt(text, None if seed is None else _seed(row[seed], where), more)


def _seed(value: Any, where: str) -> int | None:
    """A whole number from 0; None where there is none."""
    if value is None or value == "" or value != value:  # empty, in its kind of file
        return None
    try:
        text = str(value)
        number = int(text) if text.isdigit() else int(float(text))  # a column with gaps is one of decimal numbers
        if number < 0 or number != float(value):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: seed {value!r}, expected a whole number from 0") from error
    return number


def as_prompts(given: str | Path | Sequence[str], column: str = "prompt") -> list[Prompt]:
    """Prompts of a file or a named set, or these; raises as `read_prompts`."""
    if isinstance(given, str | Path):
        return read_prompts(given, column)
    if not given or any(not text.strip() for text in given):
        raise ValueError(f"prompts {list(given)}: expected texts")
    return [Prompt(text) for text in given]
