"""Prompts from files of each kind, and folders as evaluators read them."""

import json

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from mfm_lightning.sampling.prompt_folder import PromptFolder
from mfm_lightning.sampling.prompts import Prompt, as_prompts, read_prompts

TEXTS = ["a red cat", "über, 'quoted' \"text\"", "日本 \u2028of two \x85lines"]  # a text's own ends are no rows


def write(path, rows):
    if path.suffix == ".txt":
        path.write_text("\ufeff" + "\n\n".join(row["prompt"] for row in rows) + "\n", encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pandas.DataFrame(rows).to_parquet(path)
    else:
        pandas.DataFrame(rows).to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")


@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file(tmp_path, suffix):
    path = tmp_path / f"prompts{suffix}"
    texts = [text.replace('"', "") if suffix == ".tsv" else text for text in TEXTS]  # pandas would quote them
    write(path, [{"prompt": text, "seed": 3 * i, "tag": f"t{i}"} for i, text in enumerate(texts)])
    found = read_prompts(path)
    assert [prompt.text for prompt in found] == texts
    if suffix != ".txt":
        assert [prompt.seed for prompt in found] == [0, 3, 6]
        assert [prompt.more["tag"] for prompt in found] == ["t0", "t1", "t2"]
        assert "seed" not in found[0].more


def test_a_seed_may_be_left_out_in_some_rows(tmp_path):
    for suffix in (".csv", ".parquet", ".jsonl"):
        write(tmp_path / f"p{suffix}", [{"prompt": "a", "seed": 5.0}, {"prompt": "b", "seed": None}])
        assert [prompt.seed for prompt in read_prompts(tmp_path / f"p{suffix}")] == [5, None]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "\n \n", "has no prompts"),
        ("p.md", "a", r"prompts are read from \.txt, \.json"),
        ("p.csv", "text\na\n", r"row 1: no column 'prompt', only text"),
        ("p.csv", "prompt,seed\na,1\nb,x\n", r"row 2: seed 'x', expected a whole number from 0"),
        ("p.csv", "prompt,seed\na,-1\n", r"row 1: seed '-1'"),
        ("p.csv", "prompt,seed\na,1.5\n", r"row 1: seed '1.5'"),
        ("p.csv", "prompt\na red cat, on a mat\n", r"row 1: more fields than columns, from \[' on a mat'\]"),
        ("p.csv", "prompt,Seed\na,x\n", r"row 1: seed 'x'"),
        ("p.jsonl", '{"prompt": 3}', r"row 1: prompt is 3, expected a text"),
        ("p.jsonl", '{"prompt": "a"}\n\n{', r"row 3: no JSON"),
        ("p.json", '{"prompt": "a"}', r"a dict, expected a list"),
        ("p.json", '["a", 3]', r"row 2: a int, expected a text or an object"),
        ("p.json", "[", r"no JSON"),
        ("p.jsonl", "[1]", r"row 1: a list, expected an object"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"no prompts at .*none\.txt"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="expected texts"):
        as_prompts([" "])


def test_a_column_of_another_name(tmp_path):
    (tmp_path / "p.tsv").write_text("Prompt\tCategory\nbond\tAbstract\n")  # PartiPrompts
    assert read_prompts(tmp_path / "p.tsv") == [Prompt("bond", None, {"Category": "Abstract"})]
    (tmp_path / "p.tsv").write_text('Prompt\tCategory\n"Fall is here" on a sign\tA\nthe words "a\tB\n')  # its quotes
    assert [p.text for p in read_prompts(tmp_path / "p.tsv")] == ['"Fall is here" on a sign', 'the words "a']
    (tmp_path / "p.json").write_text('["bond", "a cat"]')  # HPDv2's benchmark
    assert [prompt.text for prompt in read_prompts(tmp_path / "p.json", "caption")] == ["bond", "a cat"]
    (tmp_path / "p.csv").write_text("Text,Id\nbond,1\n")
    assert read_prompts(tmp_path / "p.csv", "text")[0].text == "bond"


IMAGE = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("flat", ["000000.png", "000001.png", "000002.png", "000003.png"]),
        # github.com/djghosh13/geneval: NUMBER/metadata.jsonl with the prompt's line, NUMBER/samples/NUMBER.png
        ("geneval", [f"0000{p}/samples/000{k}.png" for p in range(2) for k in range(2)]),
        # github.com/Karine-Huang/T2I-CompBench: samples/PROMPT_NUMBER.png, numbers in order over all
        ("compbench", [f"samples/{t}_00000{i}.png" for i, t in enumerate(["a cat", "a cat", "a dog", "a dog"])]),
        # github.com/CodeGoat24/UniGenBench: INDEX_NUMBER.png, by the file's own index
        ("unigenbench", ["10_0.png", "10_1.png", "11_0.png", "11_1.png"]),
    ],
)
def test_layouts_of_evaluators(tmp_path, layout, expected):
    prompts = [Prompt("a cat", None, {"index": 10, "tag": "one"}), Prompt("a dog", None, {"index": 11, "tag": "two"})]
    folder = PromptFolder(tmp_path, prompts, 2, layout)
    folder.claim({"method": "m"})
    for image in folder.missing():
        folder.write(image.index, IMAGE, {"rewards": {"r": 1.5}})
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.png")) == sorted(expected)
    assert [line["file"] for line in folder.lines()] == expected
    stored = torch.from_numpy(np.array(Image.open(tmp_path / expected[0]))).permute(2, 0, 1)
    assert (stored.float() / 255 - IMAGE).abs().max() <= 0.5 / 255 + 1e-6
    if layout == "geneval":
        metadata = json.loads((tmp_path / "00001/metadata.jsonl").read_text())
        assert metadata == {"prompt": "a dog", "index": 11, "tag": "two"}


def test_several_processes_and_a_kill(tmp_path):
    prompts = [Prompt(text) for text in "abcd"]
    one, two = (PromptFolder(tmp_path, prompts, rank=rank) for rank in (0, 1))
    for folder in (one, two):
        folder.claim({"seed": 0})
    one.write(0, IMAGE, {"by": 0, "said": "a\u2028b"})
    two.write(1, IMAGE, {"by": 1})
    with open(tmp_path / "lines_0.jsonl", "a") as file:
        file.write('{"index": 2, "file": "0000')  # half a line, of a kill
    (tmp_path / "000001.png").unlink()
    assert [image.index for image in one.missing()] == [1, 2, 3]
    one.write(2, IMAGE, {"by": 0})
    assert [image.index for image in two.missing()] == [1, 3]
    two.write(1, IMAGE, {"by": "again"})
    assert [(line["index"], line["by"]) for line in one.lines()] == [(0, 0), (1, "again"), (2, 0)]


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown layout 'x': expected one of flat, geneval, compbench, unigenbench"):
        PromptFolder(tmp_path, [Prompt("a")], layout="x")
    with pytest.raises(ValueError, match="images_per_prompt 0 must be at least 1"):
        PromptFolder(tmp_path, [Prompt("a")], 0)
    with pytest.raises(ValueError, match=r"prompt 1, 'b/c': T2I-CompBench's file names allow no '_' and no '/'"):
        PromptFolder(tmp_path, [Prompt("a"), Prompt("b/c")], layout="compbench")
    with pytest.raises(ValueError, match=r"layout unigenbench: 1 names would be of several images, first 3_0\.png"):
        PromptFolder(tmp_path, [Prompt("a", None, {"index": 3}), Prompt("b", None, {"index": 3})], layout="unigenbench")
    with pytest.raises(ValueError, match=r"the name x+\.\.\. is too long for a file"):
        PromptFolder(tmp_path, [Prompt("x" * 240)], layout="compbench")
    PromptFolder(tmp_path, [Prompt("c")]).claim({"seed": 0})
    first = PromptFolder(tmp_path, [Prompt("a")])
    first.claim({"seed": 0})  # what made no image stands in nobody's way
    first.write(0, IMAGE, {})
    for seed in (None, 3):
        other = PromptFolder(tmp_path, [Prompt("b" if seed is None else "a", seed)])
        with pytest.raises(ValueError, match="has images of other settings, which differ in prompts"):
            other.claim({"seed": 0})
    with pytest.raises(ValueError, match=r"differ in prompts \(prompts: \[\['a', None.* there, \[\['b', None.* now\)"):
        PromptFolder(tmp_path, [Prompt("b")]).claim({"seed": 0})
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        PromptFolder(tmp_path / "file", [Prompt("a")]).claim({})
