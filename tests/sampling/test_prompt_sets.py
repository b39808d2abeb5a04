"""Named prompt sets: the package's is what was published, the others are fetched by the command that is said."""

import dataclasses
import json
import logging
import shutil
import subprocess
from collections import Counter

import pytest
import torch

from mfm_lightning.commands.errors import CommandLineError
from mfm_lightning.commands.main import run
from mfm_lightning.data import PromptsDataModule
from mfm_lightning.sampling import prompt_sets
from mfm_lightning.sampling.prompt_folder import PromptFolder
from mfm_lightning.sampling.prompts import read_prompts

NUMBERS = {2: "two", 3: "three", 4: "four"}


def article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def said_of(tag: str, include: list[dict]) -> str:
    """The text that GenEval's metadata describe, by its paper (section 3)."""
    names = [f"{thing['color']} {thing['class']}" if "color" in thing else thing["class"] for thing in include]
    if tag == "counting":
        name = names[0]
        return f"a photo of {NUMBERS[include[0]['count']]} {name}{'es' if name.endswith('s') else 's'}"
    if tag == "position":
        return f"a photo of {article(names[1])} {include[1]['position'][0]} {article(names[0])}"
    return "a photo of " + " and ".join(map(article, names))


def test_geneval_is_what_was_published():
    found = read_prompts("geneval")
    assert len(found) == prompt_sets.SETS["geneval"].count == len({prompt.text for prompt in found}) == 553
    tags = Counter(prompt.more["tag"] for prompt in found)
    expected = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
    assert tags == expected
    for prompt in found:
        assert prompt.text == said_of(prompt.more["tag"], prompt.more["include"]), prompt
        excluded = [(thing["class"], thing["count"]) for thing in prompt.more.get("exclude") or []]
        more = [(thing["class"], thing["count"] + 1) for thing in prompt.more["include"]]
        assert excluded == (more if prompt.more["tag"] == "counting" else [])
    assert [prompt.text for prompt in found[:2]] == ["a photo of a bench", "a photo of a cow"]  # lines 0 and 1 there
    licence = (prompt_sets.SHIPPED / "geneval/LICENSE").read_text()
    assert "MIT License" in licence
    assert "Dhruba Ghosh" in licence


def test_its_metadata_reach_the_evaluators_file(tmp_path):
    data = PromptsDataModule("geneval")
    folder = PromptFolder(tmp_path, data.prompts, 4, "geneval")
    lines = prompt_sets.files_of("geneval")[0].read_text().splitlines()
    for number in (0, 200, 552):
        folder.write(4 * number, torch.rand(3, 4, 4), {})
        written = json.loads((tmp_path / f"{number:05d}/metadata.jsonl").read_text())
        assert written == json.loads(lines[number])


def test_all_sets_have_sources_and_licences():
    for name, chosen in prompt_sets.SETS.items():
        assert chosen.licence
        assert chosen.paper.startswith("arXiv ")
        assert chosen.source
        assert bool(chosen.url) != bool(chosen.sha256), name
        if not chosen.url:
            assert chosen.licence in ("MIT", "Apache-2.0"), "data of the package need a licence that allows it"
            assert (prompt_sets.SHIPPED / name / "LICENSE").is_file()
        if chosen.parts:
            assert chosen.count % len(chosen.parts) == 0


FILES = {
    "compbench": lambda part: f"a {part} cat\na {part} dog\n",
    "hpdv2": lambda part: json.dumps([f"a {part} cat", f"a {part} dog"]),
    "parti": lambda part: "Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\t\n",
    "drawbench": lambda part: '"Prompts","Category"\n"A red colored car.","Colors"\n',
    "unigenbench": lambda part: 'index,prompt,sub_dims\n7,a cat,"{""a"": 1}"\n',
}


@pytest.mark.parametrize("name", list(FILES))
def test_the_command_fetches_to_where_the_name_looks(tmp_path, monkeypatch, caplog, name):
    """curl itself, from files of the published names here; nothing is asked of the network."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    monkeypatch.chdir(tmp_path)
    chosen = prompt_sets.SETS[name]
    with pytest.raises(FileNotFoundError, match=rf"prompt set {name} \({chosen.count} prompts.*curl -fL"):
        read_prompts(name)
    there = tmp_path / "theirs"
    there.mkdir()
    published = chosen.url.rsplit("/", 1)[1].replace("?tqx=out:csv", "")
    monkeypatch.setitem(prompt_sets.SETS, name, dataclasses.replace(chosen, url=f"file://{there}/{published}"))
    for part in chosen.parts or (published.rsplit(".", 1)[0],):
        begin, _, end = published.partition("{")
        end = end.partition("}")[2]
        (there / (f"{begin}{part}{end}" if chosen.parts else published)).write_text(FILES[name](part))
    assert not prompt_sets.is_there(name)
    subprocess.run(prompt_sets.fetch_command(name), shell=True, check=True, capture_output=True)
    assert prompt_sets.is_there(name)
    with caplog.at_level(logging.WARNING):
        found = read_prompts(name)
    assert len(found) == 2 * len(chosen.parts) or (not chosen.parts and len(found) == 1)
    assert f"{len(found)} prompts here, and {chosen.count} where it was published" in caplog.text
    if chosen.parts:
        assert [prompt.more["category"] for prompt in found[:3]] == [chosen.parts[0]] * 2 + [chosen.parts[1]]
        last = chosen.parts[-1]
        assert [prompt.text for prompt in read_prompts(f"{name}/{last}")] == [f"a {last} cat", f"a {last} dog"]
    if name == "unigenbench":
        assert found[0].more["index"] == "7"
    if name == "drawbench":
        assert found[0].text == "A red colored car."
        assert found[0].more == {"Category": "Colors"}


def test_what_is_wrong_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"did you mean the prompt set geneval\?"):
        read_prompts("gen-eval")
    with pytest.raises(FileNotFoundError, match=r"no prompts at geneval.txt"):
        read_prompts("geneval.txt")
    with pytest.raises(ValueError, match="prompt set compbench has no part 'colour': its parts are color, shape"):
        read_prompts("compbench/colour")
    with pytest.raises(ValueError, match="prompt set geneval has no part 'counting': its parts are none"):
        read_prompts("geneval/counting")
    changed = tmp_path / "geneval/evaluation_metadata.jsonl"
    changed.parent.mkdir()
    changed.write_bytes(prompt_sets.files_of("geneval")[0].read_bytes() + b"\n")
    monkeypatch.setattr(prompt_sets, "SHIPPED", tmp_path)
    with pytest.raises(ValueError, match="was changed: sha256"):
        read_prompts("geneval")


def test_the_command_shows_them(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(["data", "--prompts", "list"])
    shown = capsys.readouterr().out
    for name, chosen in prompt_sets.SETS.items():
        assert f"{name}: {chosen.count} prompts" in shown
        assert chosen.licence in shown
        assert prompt_sets.fetch_command(name) in shown
    run(["data", "--prompts", "geneval"])
    shown = capsys.readouterr().out
    assert "geneval: 553 prompts, 553 different ones" in shown
    assert "counting (80)" in shown
    for given in ([], ["--prompts", "geneval", "--config", "digits/flow"]):
        with pytest.raises(CommandLineError, match="needs one of --config and --prompts"):
            run(["data", *given])
