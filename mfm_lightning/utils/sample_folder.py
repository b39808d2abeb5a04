"""The note that `mfm sample` leaves beside its samples, by which others know whether all are there."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

SETTINGS, PARTS = "samples.json", "parts"
OWN_FILES = {SETTINGS, "index.json", "classes.json"}
_PNG = re.compile(r"\d{8,}\.png")


def check_finished(folder: Path) -> None:
    """Raise ValueError if `mfm sample` has begun a folder and not finished it, or it has more than that wrote."""
    path = folder / SETTINGS
    if not path.is_file():
        return
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        form, number = settings["format"], int(settings["num_samples"])
    except (KeyError, TypeError, ValueError):
        return  # somebody else's file of that name
    files = {"npz": "samples.npz", "webdataset": "index.json"}
    if form == "png":
        there = sum(_PNG.fullmatch(entry.name) is not None for entry in os.scandir(folder))
        wrong = f"{there} of {number} samples are there" if there < number else ""
        if there > number:
            raise ValueError(f"{folder} has {there} samples, and {path} says {number}: remove what is not of them")
    else:
        wrong = "" if form not in files or (folder / files[form]).is_file() else f"{files[form]} is not there"
    if not wrong and (folder / PARTS).is_dir():
        wrong = f"{folder / PARTS} is still there"
    if wrong:
        raise ValueError(f"{folder} is unfinished ({wrong}): run the same mfm sample command again, which goes on")
