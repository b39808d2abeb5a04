"""Class folders: which of them are classes, their labels, and the names of train and validation."""

import json
import os
import time
from pathlib import Path

import pytest

from mfm_lightning.data import LatentShards
from mfm_lightning.data.class_folders import find_classes, read_class_index
from mfm_lightning.data.latents.index import CLASSES, LatentIndexError
from tests.inputs.pictures import mfm, moments, picture, prepare, refused, save, write
from tests.latent_data import shards


def tree(root: Path, *names: str) -> Path:
    """An image in each folder of these."""
    for i, name in enumerate(names):
        save(root / name / "a.png", picture(20, i))
    return root


def labels(made: Path, root: Path, output: Path, *more: object) -> tuple[dict[str, int], str]:
    """Labels by folder in the shards, read by tarfile, and what was said."""
    status, said = prepare(made, root, output, *more)
    assert status == 0, said
    return {key.split("/")[0]: label for key, (label, _) in moments(output).items()}, said


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", "__MACOSX", ".thumbnails", ".git/objects"])
def test_hidden_folders_are_no_classes(hidden, made, tmp_path):
    root = tree(tmp_path / "x", "b", "a", hidden)
    tree(root / "a", ".ipynb_checkpoints")
    found, said = labels(made, root, tmp_path / "out")
    assert found == {"a": 0, "b": 1}
    assert "2 images of 2 classes: 0 a, 1 b" in said
    assert json.loads((tmp_path / "out/classes.json").read_text()) == {"a": 0, "b": 1}


@pytest.mark.parametrize(
    ("names", "order"),
    [
        ([str(i) for i in range(12)], True),
        (["3", "20", "100"], True),
        ([f"{i:03d}" for i in (2, 10, 100)], False),
        (["1", "10", "2", "b"], False),
    ],
)
def test_whole_numbers_are_in_numeric_order(names, order, made, tmp_path):
    found, said = labels(made, tree(tmp_path / "x", *names), tmp_path / "out")
    expected = sorted(names, key=int) if order else sorted(names)
    assert found == {name: i for i, name in enumerate(expected)}
    assert ("in numeric order" in said) == order
    assert f"{len(names)} classes" in said


WORDNET = ("n01440764", "n01443537", "n01484850")
INDICES = {  # of a class index, whose order is another one than that of the names
    "names.json": json.dumps({"dog": 0, "cat": 1, "eel": 2}),
    "list.json": json.dumps(["dog", "cat", "eel"]),
    "lines.txt": "\ufeffdog\r\ncat\r\neel\r\n",
    "numbered.txt": "0: dog\n1: cat\n2: eel\n",
    "python.txt": "{0: 'dog', 1: 'cat', 2: 'eel'}",
    "labels.json": json.dumps({"2": "eel", "0": "dog", "1": "cat"}),
}


@pytest.mark.parametrize("name", INDICES)
def test_a_class_index_decides(name, made, tmp_path):
    write(tmp_path / name, INDICES[name].encode())
    root = tree(tmp_path / "x", "cat", "dog", "eel")
    found, said = labels(made, root, tmp_path / "out", "--class-index", tmp_path / name)
    assert found == {"dog": 0, "cat": 1, "eel": 2}
    assert f"3 classes (by {tmp_path / name})" in said


def test_imagenet_s_own_indices_name_folders_by_wordnet(made, tmp_path):
    """As keras and torchvision have it; and LOC_synset_mapping.txt. Of a part of the classes, labels stay."""
    keras = {str(i): [wordnet, name] for i, (wordnet, name) in enumerate(zip(WORDNET, "cba", strict=True))}
    write(tmp_path / "imagenet_class_index.json", json.dumps(keras).encode())
    lines = "".join(f"{wordnet} {name}, synonym\n" for wordnet, name in zip(WORDNET, "cba", strict=True))
    write(tmp_path / "LOC_synset_mapping.txt", lines.encode())
    root = tree(tmp_path / "x", WORDNET[2], WORDNET[0])
    for k, name in enumerate(("imagenet_class_index.json", "LOC_synset_mapping.txt")):
        found, said = labels(made, root, tmp_path / f"out{k}", "--class-index", tmp_path / name)
        assert found == {WORDNET[0]: 0, WORDNET[2]: 2}
        assert "which has 1 more, without images" in said
        assert len(json.loads((tmp_path / f"out{k}/classes.json").read_text())) == 3


def test_a_class_index_that_does_not_fit(made, tmp_path):
    root = tree(tmp_path / "x", "0", "1", "10", "2")
    for content, message in (
        ('{"0": 0, "1": 1}', "has no class '10'"),
        ('{"0": 0, "1": 0, "10": 2, "2": 3}', "labels must be 0..3, each once"),
        ('{"0": 0, "0": 1, "10": 2, "2": 3}', "'0' is there twice"),
        ('["0", "1", "1", "2"]', "the class '1' is there twice"),
        ('{"0": 0, "1": 1', "no JSON"),
    ):
        write(tmp_path / "index.json", content.encode())
        refused(prepare(made, root, tmp_path / "out", "--class-index", tmp_path / "index.json"), "index.json", message)
    write(tmp_path / "index.json", b'{"0": 0, "1": 1, "2": 2, "10": 3}')
    assert read_class_index(tmp_path / "index.json") == {"0": 0, "1": 1, "2": 2, "10": 3}
    assert labels(made, root, tmp_path / "out", "--class-index", tmp_path / "index.json")[0]["10"] == 3


@pytest.mark.parametrize(
    ("names", "given"),
    [
        (("train/a", "train/b", "val/a", "val/b"), "train"),
        (("Training/x", "Testing/x"), "Training"),
        (("CLS-LOC/train/a", "CLS-LOC/val/a"), "CLS-LOC"),
        (("a", "b", "val/a"), "val"),
        (("train", "train/a", "train/b", "val/a"), "train"),  # with an image beside the classes
        (("train", "val"), "train"),
    ],
)
def test_a_level_too_high_is_refused(names, given, made, tmp_path):
    root = tree(tmp_path / "x", *names)
    refused(prepare(made, root, tmp_path / "out"), str(root), "not classes", f"give {root / given}")
    assert not (tmp_path / "out").exists()


def test_folders_within_classes_are_fine(made, tmp_path):
    """Also a class that has the name of a split, and one of which an index says that it is one."""
    root = tree(tmp_path / "x", "train", "bus/2019", "bus")
    assert labels(made, root, tmp_path / "out")[0] == {"bus": 0, "train": 1}
    root = tree(tmp_path / "y", "bus/2019", "car/2020")
    write(tmp_path / "index.txt", b"bus\ncar\n")
    assert labels(made, root, tmp_path / "named", "--class-index", tmp_path / "index.txt")[0] == {"bus": 0, "car": 1}


def test_no_classes_are_said_with_what_is_there(made, tmp_path):
    for i in range(3):
        save(tmp_path / "flat" / f"{i}.png", picture(20, i))
    refused(prepare(made, tmp_path / "flat", tmp_path / "out"), "any class folder", "3 images beside the class folders")
    tree(tmp_path / "x", "a")
    write(tmp_path / "x/b/photo.heic", b"?")
    refused(prepare(made, tmp_path / "x", tmp_path / "out"), "no valid file for the classes b", "1 .heic (b/photo.heic")
    (tmp_path / "x/b/photo.heic").unlink()
    (tmp_path / "x/b").rmdir()
    save(tmp_path / "x/beside.png", picture())
    write(tmp_path / "x/labels.csv", b"a,0")
    write(tmp_path / "x/photo.heic", b"?")
    said = labels(made, tmp_path / "x", tmp_path / "out")[1]
    assert (
        "3 files left out: 1 images beside the class folders, 1 .csv, 1 .heic (beside.png, labels.csv, photo.heic)"
        in said
    )


def test_links_are_followed_but_not_round(tmp_path):
    root = tree(tmp_path / "x", "a")
    (root / "a/back").symlink_to(root, target_is_directory=True)
    (root / "b").symlink_to(root / "a", target_is_directory=True)
    assert [image.name for image in find_classes(root).images] == ["a/a.png", "b/a.png"]


# -- train and validation ----------------------------------------------------------------------------------------------


def data(folder: Path, val: Path) -> LatentShards:
    module = LatentShards(str(folder), batch_size=2, num_workers=0, val_folder=str(val))
    module.setup("fit")
    return module


def test_train_and_validation_are_compared_by_name(made, tmp_path):
    """Through prepared shards: as many classes, of other names."""
    for name, classes in (("train", "abd"), ("val", "abc"), ("same", "abd")):
        assert prepare(made, tree(tmp_path / name, *classes), tmp_path / f"{name}-shards")[0] == 0
    with pytest.raises(
        LatentIndexError, match=r"val-shards has other classes than .*'c' is label 2 there, no class in"
    ):
        data(tmp_path / "train-shards", tmp_path / "val-shards")
    assert data(tmp_path / "train-shards", tmp_path / "same-shards").num_classes == 3


@pytest.mark.parametrize(
    ("train", "val", "good"),
    [
        ({"a": 0, "b": 1}, {"b": 0, "a": 1}, False),
        ({"a": 0, "b": 1}, {"a": 0, "b": 1}, True),
        ({"a": 0, "b": 1}, {"0": 0, "1": 1}, True),  # of tars, whose classes have no names
        ({"a": 0, "b": 1}, None, True),
    ],
)
def test_names_that_differ(train, val, good, tmp_path):
    for name, classes in (("train", train), ("val", val)):
        shards(tmp_path / name, [4, 4], num_classes=2)
        if classes is not None:
            (tmp_path / name / CLASSES).write_text(json.dumps(classes))
    if good:
        assert data(tmp_path / "train", tmp_path / "val").num_classes == 2
    else:
        with pytest.raises(LatentIndexError, match="'a' is label 1 there, label 0 in training"):
            data(tmp_path / "train", tmp_path / "val")


def test_classes_that_are_not_the_index_s_do_not_verify(tmp_path):
    shards(tmp_path / "x", [4], num_classes=2)
    (tmp_path / "x" / CLASSES).write_text('{"a": 0, "b": 1, "c": 2}')
    refused(mfm("prepare-latents", "--verify", "--output", tmp_path / "x"), "classes.json has 3 classes, the index 2")


# -- the same names, other files ---------------------------------------------------------------------------------------


def test_replaced_images_are_noticed(made, tmp_path):
    """Of another size, and of the same; also with --verify. The older note of a preparation is taken as it is."""
    root = tree(tmp_path / "x", "a", "b")
    assert prepare(made, root, tmp_path / "out")[0] == 0
    assert prepare(made, root, tmp_path / "out", "--verify")[0] == 0
    whole, time_of = (root / "a/a.png").read_bytes(), os.stat(root / "a/a.png").st_mtime_ns
    for content, later in ((whole + b"\0", 0), (whole, 10**9)):
        (root / "a/a.png").write_bytes(content)
        os.utime(root / "a/a.png", ns=(time_of + later,) * 2)
        refused(prepare(made, root, tmp_path / "out", "--verify"), "other files of the same names", str(root))
    os.utime(root / "a/a.png", ns=(time_of,) * 2)
    assert prepare(made, root, tmp_path / "out", "--verify")[0] == 0
    note = tmp_path / "out/preparation.json"
    begun = json.loads(note.read_text())
    del begun["input"]["contents"]
    note.write_text(json.dumps(begun))
    status, said = prepare(made, root, tmp_path / "out", "--verify")
    assert status == 0
    assert "an older version, which did not note sizes and times" in said


def test_labels_of_another_order_are_another_preparation(made, tmp_path):
    """What was begun by the order of names does not go on by that of an index."""
    root = tree(tmp_path / "x", "a", "b")
    assert prepare(made, root, tmp_path / "out")[0] == 0
    write(tmp_path / "index.txt", b"b\na\n")
    refused(prepare(made, root, tmp_path / "out", "--class-index", tmp_path / "index.txt"), "other settings (classes")


def test_many_folders_are_found_quickly(tmp_path):
    for i in range(200):
        for k in range(10):
            write(tmp_path / f"{i:03d}/{k}.JPEG", b"")
    begin = time.monotonic()
    assert len(find_classes(tmp_path).images) == 2000
    assert time.monotonic() - begin < 10
