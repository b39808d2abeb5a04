"""Scores that evaluators of text-to-image models wrote for the images of a folder, read back.

What they write was read in their repositories, whose layouts of images are those of `PromptFolder`:

- djghosh13/geneval (evaluation/evaluate_images.py): a JSON object a line and image, with `filename`, a path, and
  `correct`, true or false.
- Karine-Huang/T2I-CompBench (BLIPvqa_eval, CLIPScore_eval, UniDet_eval, 3_in_1_eval): `vqa_result.json`, a list of
  `question_id` and `answer`, a number or its text. The id is the number at the end of the image's name (UniDet), or its
  place among the images in the order of these numbers (the others): the same where no image is missing.
- CodeGoat24/UniGenBench (eval/gemini_en_eval.py and the like): a CSV with `img_path` and `result_json`, whose `score`
  has a 0 or 1 for each test point of the prompt. An image's score is the share of ones.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from mfm_lightning.sampling.prompt_folder import PromptFolder
from mfm_rewards.text_lists import lines_of, read_text

SUFFIXES = (".jsonl", ".json", ".csv")


def read_evaluation(path: str | Path, folder: PromptFolder) -> dict[int, float]:
    """The score of each image that a file has one for, by the image's index.

    Args:
        path: what an evaluator wrote: GenEval's `.jsonl`, T2I-CompBench's `.json` or UniGenBench's `.csv`.
        folder: of the images that were evaluated.

    Returns:
        Scores, of GenEval and UniGenBench in [0, 1]. Images without one are left out.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: for another kind of file; a row without a score, for no image of the folder, or for one that another
            row is for; and where T2I-CompBench numbered the images of a folder that has not all of them.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no results of an evaluator at {path}: run it on the images in {folder.path} first")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: results are read from {', '.join(SUFFIXES)} (GenEval, T2I-CompBench, UniGenBench)")
    read = {".jsonl": _geneval, ".json": _compbench, ".csv": _unigenbench}[path.suffix]
    places = {PurePosixPath(file).parts: image.index for image, file in zip(folder.images, folder.files, strict=True)}
    scores: dict[int, float] = {}
    strange: list[str] = []
    for where, image, score in read(path):
        index = image if isinstance(image, int) else _index_of(image, places, folder.path)
        if index is None or not 0 <= index < len(folder.images):
            strange.append(f"{where} ({image})")
        elif index in scores:
            raise ValueError(f"{where}: a second score for the image {folder.files[index]}")
        else:
            scores[index] = _number(score, where)
    if strange:
        raise ValueError(
            f"{path}: {len(strange)} of {len(strange) + len(scores)} rows are of no image in {folder.path}, first "
            f"{strange[0]}; images there are named as {folder.files[0]}"
        )
    if not scores:
        raise ValueError(f"{path} has no rows")
    if path.suffix == ".json" and (missing := len(folder.missing())):
        raise ValueError(
            f"{path}: T2I-CompBench numbers images by their order, and {missing} of {len(places)} are missing in "
            f"{folder.path}: make them, and evaluate again"
        )
    return scores


def _geneval(path: Path) -> Iterator[tuple[str, str, Any]]:
    for number, line in enumerate(lines_of(read_text(path)), 1):
        if line.strip():
            where = f"{path}, row {number}"
            row = _object(_json(line, where), ("filename", "correct"), where, "GenEval's")
            yield where, str(row["filename"]), row["correct"]


def _compbench(path: Path) -> Iterator[tuple[str, int, Any]]:
    rows = _json(read_text(path), str(path))
    if not isinstance(rows, list):
        raise ValueError(f"{path}: a {type(rows).__name__}, expected T2I-CompBench's list of question_id and answer")
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        row = _object(row, ("question_id", "answer"), where, "T2I-CompBench's")
        if not isinstance(row["question_id"], int):
            raise ValueError(f"{where}: question_id is {row['question_id']!r}, expected a whole number")
        yield where, row["question_id"], row["answer"]


def _unigenbench(path: Path) -> Iterator[tuple[str, str, Any]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # it keeps what the judge wrote, of any length
    with io.StringIO(read_text(path), newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 1):
            where = f"{path}, row {number}"
            _object(row, ("img_path", "result_json"), where, "UniGenBench's")
            judged = _object(_json(row["result_json"], where), ("score",), f"{where}, result_json", "UniGenBench's")
            points = judged["score"]
            if not isinstance(points, list) or not points:
                raise ValueError(f"{where}: score is {points!r}, expected a list of 0 and 1")
            found = [_number(point, where) for point in points]
            yield where, row["img_path"], sum(found) / len(found)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: no JSON ({error})") from error


def _object(row: Any, keys: tuple[str, ...], where: str, whose: str) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: a {type(row).__name__}, expected {whose} {' and '.join(keys)}")
    if absent := [key for key in keys if row.get(key) is None]:
        raise ValueError(f"{where}: no {absent[0]}, only {', '.join(map(str, row))}; expected {whose} results")
    return row


def _index_of(path: str, places: Mapping[tuple[str, ...], int], folder: Path) -> int | None:
    """The image whose name in its folder a path ends with; None also for another file of the folder, as `before/` has
    under the same names."""
    parts = [part for part in PurePosixPath(path.replace("\\", "/")).parts if part != "/"]
    for k in range(len(parts)):
        if (end := tuple(parts[k:])) in places:
            return places[end]
        if folder.joinpath(*end).is_file():
            return None
    return None


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: the score is {value!r}, expected a number") from error
    if not math.isfinite(number):
        raise ValueError(f"{where}: the score is {value!r}, expected a finite number")
    return number
