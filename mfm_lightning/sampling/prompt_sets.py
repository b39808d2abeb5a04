"""Prompt sets of the literature by name: how many prompts, from where, under which licence, and where their files are.

A set whose licence allows it comes with the package. Of the others the entry has the command that fetches them to
`data/prompts`, where its name then finds them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from mfm_lightning.utils.names import nearest

SHIPPED = Path(__file__).with_name("prompt_data")
FETCHED = Path("data/prompts")  # in the current folder
_RAW = "https://raw.githubusercontent.com"


@dataclass(frozen=True)
class PromptSet:
    """One set.

    Attributes:
        about: what it is, in a line.
        count: number of prompts, as published.
        paper: where it was published.
        source: where its files come from.
        licence: of the prompts, as their authors state it; "none stated" where we found none.
        files: names in its folder; several are the parts of a set, by the name before the dot.
        column: that has the texts.
        url: of the files, with `{a,b}` for several, as curl reads it; "" for a set of the package.
        sha256: of the package's file, in hexadecimal.
    """

    about: str
    count: int
    paper: str
    source: str
    licence: str
    files: tuple[str, ...]
    column: str = "prompt"
    url: str = ""
    sha256: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts, where there are several."""
        return tuple(file.rsplit(".", 1)[0] for file in self.files) if len(self.files) > 1 else ()


SETS: dict[str, PromptSet] = {
    "geneval": PromptSet(
        "objects, their number, colours and positions; metadata for its detector",
        553,
        "arXiv 2310.11513",
        "github.com/djghosh13/geneval, prompts/evaluation_metadata.jsonl",
        "MIT",
        ("evaluation_metadata.jsonl",),
        sha256="5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
    ),
    "drawbench": PromptSet(
        "11 categories of hard prompts, of Imagen",
        200,
        "arXiv 2205.11487",
        "the spreadsheet that imagen.research.google links to",
        "none stated",
        ("drawbench.csv",),
        column="Prompts",
        url="https://docs.google.com/spreadsheets/d/1y7nAbmR4FREi6npB1u-Bo3GFdwdOPYJc617rBOxIRHY/gviz/tq?tqx=out:csv",
    ),
    "parti": PromptSet(
        "PartiPrompts (P2), with categories and challenges",
        1632,
        "arXiv 2206.10789",
        "github.com/google-research/parti, PartiPrompts.tsv",
        "Apache-2.0",
        ("PartiPrompts.tsv",),
        url=f"{_RAW}/google-research/parti/HEAD/PartiPrompts.tsv",
    ),
    "hpdv2": PromptSet(
        "the benchmark prompts of HPDv2, 800 of each of four styles",
        3200,
        "arXiv 2306.09341",
        "huggingface.co/datasets/zhwang/HPDv2, benchmark/",
        "Apache-2.0",
        ("anime.json", "concept-art.json", "paintings.json", "photo.json"),
        url="https://huggingface.co/datasets/zhwang/HPDv2/resolve/main/benchmark/{anime,concept-art,paintings,photo}.json",
    ),
    "compbench": PromptSet(
        "the test prompts of T2I-CompBench++, 300 of each of eight kinds of composition",
        2400,
        "arXiv 2307.06350",
        "github.com/Karine-Huang/T2I-CompBench, examples/dataset/",
        "MIT",
        (
            *("color.txt", "shape.txt", "texture.txt", "spatial.txt"),
            *("3d_spatial.txt", "numeracy.txt", "non_spatial.txt", "complex.txt"),
        ),
        url=f"{_RAW}/Karine-Huang/T2I-CompBench/HEAD/examples/dataset/"
        "{color,shape,texture,spatial,3d_spatial,numeracy,non_spatial,complex}_val.txt",
    ),
    "unigenbench": PromptSet(
        "English short prompts of UniGenBench, with test points for its judge",
        600,
        "arXiv 2508.20751",
        "github.com/CodeGoat24/UniGenBench, data/test_prompts_en.csv",
        "none stated",
        ("test_prompts_en.csv",),
        url=f"{_RAW}/CodeGoat24/UniGenBench/HEAD/data/test_prompts_en.csv",
    ),
}


def fetch_command(name: str) -> str:
    """The command that writes the files of a set to `data/prompts`; "" for a set of the package."""
    chosen = SETS[name]
    if not chosen.url:
        return ""
    to = f"#1{Path(chosen.files[0]).suffix}" if chosen.parts else chosen.files[0]
    return f"curl -fL --create-dirs -o '{(FETCHED / name / to).as_posix()}' '{chosen.url}'"


def split_name(text: str) -> tuple[str, str]:
    """`compbench/color` as `("compbench", "color")`, and `geneval` as `("geneval", "")`.

    Raises:
        ValueError: for a part that the set does not have.
        KeyError: for a name that is none of a set.
    """
    name, _, part = text.partition("/")
    if name not in SETS:
        raise KeyError(text)
    if part and part not in SETS[name].parts:
        parts = ", ".join(SETS[name].parts) or "none"
        raise ValueError(f"prompt set {name} has no part {part!r}: its parts are {parts}")
    return name, part


def nearest_set(text: str) -> str | None:
    """The name of a set that `text` may be a misspelling of."""
    return None if Path(text).suffix else nearest(text, SETS)


def is_there(name: str) -> bool:
    """Whether all files of a set are on this machine."""
    return all((_folder(name) / file).is_file() for file in SETS[name].files)


def files_of(text: str) -> list[Path]:
    """The files of a set, or of one part of it.

    Raises:
        KeyError, ValueError: as `split_name`.
        FileNotFoundError: if they have to be fetched first, with the command.
        ValueError: if the package's file is not what it was.
    """
    name, part = split_name(text)
    chosen = SETS[name]
    wanted = [file for file in chosen.files if not part or file.rsplit(".", 1)[0] == part]
    paths = [_folder(name) / file for file in wanted]
    if missing := [path for path in paths if not path.is_file()]:
        raise FileNotFoundError(
            f"prompt set {name} ({chosen.count} prompts, licence: {chosen.licence}) is not at {missing[0]}; "
            f"fetch it to there: {fetch_command(name)}"
        )
    if chosen.sha256 and (found := hashlib.sha256(paths[0].read_bytes()).hexdigest()) != chosen.sha256:
        raise ValueError(f"{paths[0]} was changed: sha256 {found[:12]}..., expected {chosen.sha256[:12]}...")
    return paths


def _folder(name: str) -> Path:
    return (FETCHED if SETS[name].url else SHIPPED) / name
