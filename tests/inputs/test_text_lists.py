"""Lists of names and prompts as people have them: the right one for each label, or a line that says what is wrong."""

import codecs
import json
import logging

import pytest
import torch

import mfm_rewards
from mfm_rewards import registry
from mfm_rewards.prompts import imagenet_classes, load_class_names
from mfm_rewards.text_lists import TextListError, read_list, read_object
from tests.inputs.pictures import mfm, picture, refused, save, write


@pytest.fixture
def asked(tmp_path):
    """What a reward is asked, by `mfm rewards --score` of two images."""
    heard: list[str] = []

    def hears(images, prompts):
        heard.extend(prompts)
        return torch.zeros(len(images))

    mfm_rewards.register("hears", hears)
    for name in ("a", "b"):
        save(tmp_path / f"images/{name}.png", picture())

    def ask(*options: object) -> tuple[tuple[int, str], list[str]]:
        heard.clear()
        images = ("--images", tmp_path / "images", "--device", "cpu")
        return mfm("rewards", "--score", "hears", *images, *options), list(heard)

    yield ask
    registry._FACTORIES.pop("hears", None)


READ = {  # name of the file, its bytes, and the names by label
    "separator.txt": ("tench\u2028a fish\ngoldfish\r\nshark\r".encode(), ["tench\u2028a fish", "goldfish", "shark"]),
    "notepad.txt": (codecs.BOM_UTF8 + b"tench\r\ngoldfish\r\n", ["tench", "goldfish"]),
    "notepad.json": (codecs.BOM_UTF8 + b'["tench", "goldfish"]', ["tench", "goldfish"]),
    "no_end.txt": (b"tench\ngoldfish", ["tench", "goldfish"]),
    "blank_end.txt": (b"tench\ngoldfish\n\n  \n", ["tench", "goldfish"]),
    "comment.txt": (b"# from: x\n\ntench\n# y\ngoldfish\n", ["tench", "goldfish"]),
    "accents.txt": ("caf\xe9 cr\xe8me\nna\xefve\n".encode(), ["caf\xe9 cr\xe8me", "na\xefve"]),
    "synsets.txt": (b"n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius\n", ["tench", "goldfish"]),
    "synsets.csv": (b"n01440764,tench\nn01443537,goldfish\n", ["tench", "goldfish"]),
    "synsets_tab.tsv": (b"n01440764\ttench\nn01443537\tgoldfish\n", ["tench", "goldfish"]),
    "colon.txt": (b"0: tench\n1: goldfish\n", ["tench", "goldfish"]),
    "turned.txt": (b"1: goldfish\n0: tench\n", ["tench", "goldfish"]),
    "space.txt": (b"0 tench\n1 goldfish\n", ["tench", "goldfish"]),
    "numbers.txt": (b"7 of hearts\n8 of spades\n", ["7 of hearts", "8 of spades"]),
    "digits.txt": (b"0\n1\n2\n", ["0", "1", "2"]),
    "comma.txt": (b"jay, bird\nwolf\nfox\n", ["jay, bird", "wolf", "fox"]),
    "clsidx.txt": (b"{0: 'tench, Tinca tinca',\n 1: \"jack-o'-lantern\"}", ["tench, Tinca tinca", "jack-o'-lantern"]),
    "python_list.txt": (b"['tench', 'goldfish']\n", ["tench", "goldfish"]),
    "keras.json": (b'{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}', ["tench", "goldfish"]),
    "label_last.csv": (b"tench,0\ngoldfish,1\n", ["tench", "goldfish"]),
    "label_last.tsv": (b"goldfish\t1\ntench\t0\n", ["tench", "goldfish"]),
    "years.txt": (b"Acura RL Sedan 2012\nAudi A5 Coupe 2012\n", ["Acura RL Sedan 2012", "Audi A5 Coupe 2012"]),
    "cars.txt": (b"1957 Chevrolet\n1964 Ford\n", ["1957 Chevrolet", "1964 Ford"]),
    "by_label.json": (b'{"1": "goldfish", "0": "tench"}', ["tench", "goldfish"]),
    "by_name.json": (b'{"goldfish": 1, "tench": 0}', ["tench", "goldfish"]),
}


@pytest.mark.parametrize("name", READ)
def test_the_prompt_of_a_label_has_its_name(name, asked, tmp_path):
    content, names = READ[name]
    write(tmp_path / name, content)
    assert load_class_names(tmp_path / name) == names
    for label in (0, len(names) - 1):
        (status, said), prompts = asked("--prompt", "a {class}.", "--label", label, "--class-names", tmp_path / name)
        assert status == 0, said
        assert prompts == [f"a {names[label]}."] * 2


REFUSED = {
    "gap.txt": (b"tench\n\ngoldfish\n", "line 2 is empty"),
    "gap_spaces.txt": (b"tench\ngoldfish\n \t\nshark\n", "line 3 is empty"),
    "gap_first.txt": (b"\ntench\ngoldfish\n", "line 1 is empty"),
    "utf16.txt": ("tench\ngoldfish\n".encode("utf-16"), "is UTF-16"),
    "utf16_be.txt": (codecs.BOM_UTF16_BE + "tench\n".encode("utf-16-be"), "is UTF-16"),
    "utf16.json": ('["tench"]'.encode("utf-16"), "is UTF-16"),
    "latin1.txt": (b"tench\ncaf\xe9\n", "no UTF-8 (line 2)"),
    "mixed.txt": (b"n01440764 tench\nn01443537 goldfish\nshark\n", "line 3 ('shark') is not of the form"),
    "header.csv": (b"index,name\n0,tench\n1,goldfish\n", "line 1 ('index,name') is not of the form"),
    "from_one.txt": (b"1: tench\n2: goldfish\n", "labels must be 0..1, each once (found 1..2"),
    "lost.json": (b'{"0": "tench", "2": "shark"}', "labels must be 0..1"),
    "twice.json": (b'{"0": "tench", "0": "shark"}', "'0' is there twice"),
    "twice.txt": (b"{0: 'tench', 0: 'shark'}", "0 is there twice"),
    "ids.txt": (b"n01440764\nn01443537\n", "WordNet ids (n01440764), and no names"),
    "from_one_spaced.txt": (b"1 tench\n2 goldfish\n", "labels must be 0..1, each once (found 1..2"),
    "lost_spaced.txt": (b"0 tench\n1 goldfish\n3 shark\n", "labels must be 0..2"),
    "from_one_last.csv": (b"tench,1\ngoldfish,2\n", "labels must be 0..1"),
    "synonyms.json": (b'{"0": ["tench", "Tinca tinca"]}', "is no name"),
    "nested.json": (b'[["a", "b", "c"]]', "is no name"),
    "empty_name.json": (b'["tench", ""]', "or an empty one"),
    "null.json": (b'["tench", null]', "None is no name"),
    "cut.json": (b'["tench", "gold', "no JSON"),
    "code.txt": (b"{0: __import__('os').system('true')}", "no JSON, and no dictionary of Python"),
    "number.json": (b"7", "no list of names"),
    "empty.txt": (b"", "holds no names"),
    "comments.txt": (b"# only\n", "holds no names"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_shift_or_change_names_is_refused(name, asked, tmp_path):
    content, message = REFUSED[name]
    write(tmp_path / name, content)
    said, prompts = asked("--prompt", "a {class}", "--label", 0, "--class-names", tmp_path / name)
    refused(said, name, message)
    assert not prompts


def test_of_synonyms_it_is_said_which_is_taken(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write(tmp_path / "words.txt", b"n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    assert [(entry.wordnet, entry.name) for entry in read_list(tmp_path / "words.txt")] == [
        ("n01440764", "tench"),
        ("n01443537", "goldfish"),
    ]
    assert "of the synonyms of a WordNet id the first is taken, such as 'tench'" in caplog.text


def test_imagenet_s_own_names_are_as_they_were():
    names = imagenet_classes()
    assert len(names) == 1000
    assert (names[0], names[1], names[-1]) == ("tench", "goldfish", "toilet paper")
    assert not any("," in name and name.startswith("n0") for name in names)


def test_prompts_by_file(asked, tmp_path):
    texts = {"a.png": "a cat", "b.png": "a caf\xe9"}
    for content in (json.dumps(texts).encode(), codecs.BOM_UTF8 + json.dumps(texts, ensure_ascii=False).encode()):
        write(tmp_path / "prompts.json", content)
        assert asked("--prompts", tmp_path / "prompts.json")[1] == ["a cat", "a caf\xe9"]
    for content, message in (
        (b'{"a.png": "x", "a.png": "y", "b.png": "z"}', "'a.png' is there twice"),
        (b'{"a.png": null, "b.png": "z"}', "must be an object of a text for each file"),
        (b'{"a.png": ["x"], "b.png": "z"}', "must be an object of a text for each file"),
        (json.dumps(texts).encode("utf-16"), "is UTF-16"),
        (b'{"a.png": "x"}', "has no prompt for 1 images, first b.png"),
        (b"", "no JSON"),
    ):
        write(tmp_path / "prompts.json", content)
        refused(asked("--prompts", tmp_path / "prompts.json")[0], "prompts.json", message)
    refused(asked("--prompts", tmp_path / "none.json")[0], "no prompts at", "none.json")


def test_deep_nesting_is_no_crash(tmp_path):
    write(tmp_path / "deep.json", b"[" * 100_000)
    with pytest.raises(TextListError, match=r"deep\.json"):
        read_object(tmp_path / "deep.json")
