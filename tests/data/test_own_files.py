"""Files as people really have them - lists from spreadsheets, texts of several lines, folders given as "." - are read
right, or refused with the file, the row and what would be right."""

import io
import json
import logging
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mfm_lightning.checkpoints import CheckpointError, load_model
from mfm_lightning.data import LatentDataModule
from mfm_lightning.data.class_folders import find_classes
from mfm_lightning.data.images import CaptionedFolder, HuggingFaceImages, ImageFolder, NpzImages
from mfm_lightning.data.images.splits import labels_of
from mfm_lightning.data.latent_files import LatentArrays
from mfm_lightning.data.latent_files.opening import open_latents
from mfm_lightning.data.web.fields import Fields
from mfm_lightning.sampling.evaluations import read_evaluation
from mfm_lightning.sampling.prompts import read_prompts
from mfm_rewards.text_lists import read_list
from tests.data.test_image_faults import classes
from tests.data.web_shards import data, image_shards, numbers, warnings_of


@pytest.fixture
def images(tmp_path) -> Path:
    """Six images, 0.png to 5.png."""
    for i in range(6):
        Image.new("L", (8, 8), 40 * i).save(tmp_path / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("root", [".", "./", "../{name}", "cat/.."])
def test_a_folder_of_classes_may_be_the_one_that_one_is_in(tmp_path, monkeypatch, root):
    classes(tmp_path, {"cat": 2, "dog": 3, "x": 1})
    monkeypatch.chdir(tmp_path)
    found = ImageFolder(root.format(name=tmp_path.name))
    assert [os.path.relpath(found.place(i), ".") for i in range(3)] == ["cat/000.png", "cat/001.png", "dog/000.png"]
    assert found.image(5).size == (8, 8)
    assert found.labels.tolist() == [0, 0, 1, 1, 1, 2]


def test_of_the_parts_of_a_data_set_the_training_one_is_to_be_given(tmp_path):
    for part in ("Test", "Train", "Val"):
        classes(tmp_path / part, {"cat": 1, "dog": 1})
    with pytest.raises(ValueError, match=r"are a part of a data set, not classes: give .*Train,"):
        _ = ImageFolder(str(tmp_path)).labels


# -- captions and prompts ----------------------------------------------------------------------------------------------


def test_a_quote_without_its_end_does_not_swallow_rows(images):
    """Else the caption of 2.png would be all rows after it."""
    rows = [f"{i}.png,text {i}" for i in range(6)]
    rows[2] = '2.png,"text 2'
    (images / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    with pytest.raises(ValueError, match=r"metadata\.csv, row 3: no CSV, a quote has no end"):
        _ = CaptionedFolder(str(images)).labels
    (images / "p.csv").write_text('prompt\n"a b\nc\nd\n')
    with pytest.raises(ValueError, match=r"p\.csv, row 1: no CSV"):
        read_prompts(images / "p.csv")
    (images / "p.csv").write_text("prompt\n" + f'"{"x" * 140_000}"\n')
    with pytest.raises(ValueError, match=r"p\.csv, row 1: no CSV, field larger"):
        read_prompts(images / "p.csv")
    for text in ('"A" is a letter', '"a\\"b"', '"a cat" '):
        (images / "p.csv").write_text(f"prompt\n{text}\n")
        with pytest.raises(
            ValueError, match=r"row 1: no CSV, something follows a closing quote; a quote within a text"
        ):
            read_prompts(images / "p.csv")
    (images / "p.csv").write_text('prompt\n"a, b ""c""\nof two lines"\nd\n')  # as it should be
    assert [prompt.text for prompt in read_prompts(images / "p.csv")] == ['a, b "c"\nof two lines', "d"]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("name", ["x.txt", "x.csv", "x.tsv", "x.json", "x.jsonl"])
def test_another_encoding_is_named_with_the_file(tmp_path, name, encoding):
    text = {"x.txt": "café", "x.json": '["café"]', "x.jsonl": '{"prompt": "café"}'}.get(name, "prompt\ncafé\n")
    (tmp_path / name).write_text(text, encoding=encoding)
    with pytest.raises(ValueError, match=rf"{name} is (no UTF-8 \(line \d\): save it as UTF-8|UTF-16 or no text)"):
        read_prompts(tmp_path / name)
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert read_prompts(tmp_path / name)[0].text == "café"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_as_on_any_system(tmp_path, end):
    (tmp_path / "a.txt").write_bytes(end.join(["a cat", "", "a dog\u2028b", ""]).encode())
    assert [prompt.text for prompt in read_prompts(tmp_path / "a.txt")] == ["a cat", "a dog\u2028b"]
    (tmp_path / "a.jsonl").write_bytes(end.join(['{"prompt": "a"}', '{"prompt": "b"}', ""]).encode())
    assert [prompt.text for prompt in read_prompts(tmp_path / "a.jsonl")] == ["a", "b"]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
def test_evaluations_of_another_encoding_name_the_file(tmp_path, name):
    (tmp_path / name).write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name} is no UTF-8"):
        read_evaluation(tmp_path / name, type("Folder", (), {"path": tmp_path, "files": [], "images": []})())


def test_quotes_of_tsv_are_said_to_belong_to_the_text(tmp_path, caplog):
    (tmp_path / "p.tsv").write_text('prompt\tn\n"a b"\t1\na "sign"\t2\n')
    with caplog.at_level(logging.INFO):
        assert [prompt.text for prompt in read_prompts(tmp_path / "p.tsv")] == ['"a b"', 'a "sign"']
    assert "p.tsv: 1 rows have a text in quotes" in caplog.text


def test_texts_of_several_lines_are_one_caption_and_said(images, caplog):
    for i in range(6):
        (images / f"{i}.txt").write_text("a red bird\r\n\r\n a small  bird\n" if i == 1 else "one line\n")
    with caplog.at_level(logging.WARNING):
        found = CaptionedFolder(str(images))
        assert found.caption(1) == "a red bird a small bird"
    (message,) = [record.getMessage() for record in warnings_of(caplog)]
    assert "1 captions are of several lines, which are joined to one text: 1.png" in message
    for text, expected in (("one\r\ntwo ", "one two"), ("  one ", "one")):
        assert (
            Fields("png", caption="txt").caption_of({"__key__": "a", "__url__": "b", "txt": text.encode()}) == expected
        )


def test_a_list_that_names_none_of_the_images_shows_both_sides(images):
    def write(names):
        lines = [json.dumps({"file_name": name, "text": f"text of {i}"}) for i, name in enumerate(names)]
        (images / "metadata.jsonl").write_text("\n".join(lines))

    write([f"photo{i}.jpg" for i in range(6)])
    with pytest.raises(FileNotFoundError, match=r"it names photo0\.jpg.*the files are 0\.png"):
        _ = CaptionedFolder(str(images)).labels
    write([*(str(images / f"{i}.png") for i in range(3)), "./3.png", "sub/../4.png", "5.png"])
    assert [CaptionedFolder(str(images)).caption(i) for i in range(6)] == [f"text of {i}" for i in range(6)]
    link = images.with_name(f"{images.name}-link")
    link.symlink_to(images)
    assert CaptionedFolder(str(link)).caption(0) == "text of 0"  # the list has the paths of the folder itself
    write([str(link / f"{i}.png") for i in range(6)])
    assert CaptionedFolder(str(images)).caption(5) == "text of 5"


# -- labels and names --------------------------------------------------------------------------------------------------


def test_labels_that_are_texts_or_missing_say_what_to_do(tmp_path):
    datasets = pytest.importorskip("datasets")
    pictures = [Image.new("L", (8, 8), i) for i in range(4)]
    for labels, message in (
        (["ant", "bee", "ant", "bee"], r"label has texts, such as 'ant', .*class_encode_column\('label'\)"),
        ([0, None, 1, None], r"label has (nothing in 2 of 4 rows, first in row 1|float64 \(4,\)), not a whole number"),
    ):
        folder = tmp_path / str(labels[0])
        datasets.Dataset.from_dict({"image": pictures, "label": labels}).cast_column(
            "image", datasets.Image()
        ).save_to_disk(folder)
        with pytest.raises(ValueError, match=message):
            _ = HuggingFaceImages(str(folder)).labels


def test_a_npy_or_a_text_with_the_name_of_an_npz_is_named(tmp_path):
    with open(tmp_path / "a.npz", "wb") as file:
        np.save(file, np.zeros((4, 8, 8), np.uint8))
    (tmp_path / "b.npz").write_text("hello")
    for name in ("a", "b"):
        with pytest.raises(ValueError, match=rf"{name}\.npz is no \.npz, which is a zip of arrays"):
            _ = NpzImages(str(tmp_path / f"{name}.npz")).labels


def test_names_of_classes_that_yaml_takes_for_something_else():
    with pytest.raises(ValueError, match="classes: True is no class; yes, no, on and off are names only in quotes"):
        labels_of([True], ["no", "yes"])
    with pytest.raises(ValueError, match=r"there is no class 10 .*in quotes it is a name: '10'"):
        labels_of([10], ["0", "1", "10"])
    assert labels_of(["10", 0], ["0", "1", "10"]) == [2, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('0,"tench, Tinca"\n1,"gold"\n', 'x.txt: "tench, Tinca" is in quotes, which would belong to the name'),
        ("'a'\n'b'\n", "'a' is in quotes"),
        ("- a\n- b\n", "is a list of YAML: leave the dashes out"),
    ],
)
def test_class_lists_of_other_forms_are_refused(tmp_path, text, message):
    (tmp_path / "x.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_list(tmp_path / "x.txt")
    names = ['"Stop" and "Go"', "'a' or 'b'", '"Untitled"', "d", "e"]  # of most lines none is in quotes as a whole
    (tmp_path / "x.txt").write_text("\n".join(names))
    assert [entry.name for entry in read_list(tmp_path / "x.txt")] == names
    (tmp_path / "x.txt").write_text("rock 'n' roll\n5\" nail\n")
    assert [entry.name for entry in read_list(tmp_path / "x.txt")] == ["rock 'n' roll", '5" nail']


# -- shards, latents and weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("corrupt", ["raise", "skip"])
def test_a_name_that_is_twice_in_a_shard_is_named_with_it(tmp_path, corrupt, caplog):
    """Samples 0 to 3 and 4 to 7 of two shards, whose first sample's image is there twice."""
    urls = image_shards(tmp_path, [4, 4])
    for k in (0, 1):
        with tarfile.open(tmp_path / f"{k:03d}.tar") as tar:
            files = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]
        with tarfile.open(tmp_path / f"{k:03d}.tar", "w") as tar:
            for member, content in [files[0], *files]:
                tar.addfile(member, io.BytesIO(content))
    module = data(urls, batch_size=4, num_samples=8, num_classes=3, label="cls", corrupt=corrupt)
    if corrupt == "raise":
        with pytest.raises(ValueError, match=r"00[01]\.tar.*0000[04]\.png is there twice in a row"):
            list(module.loader(length=2))
    else:
        assert sorted(numbers(module.loader(length=2))) == list(range(8))
        assert module.skipped == 2
        whole = (tmp_path / "001.tar").read_bytes()
        (tmp_path / "001.tar").write_bytes(whole[: len(whole) // 2])  # which is another fault of the same shard
        module = data(urls, batch_size=2, num_samples=8, num_classes=3, label="cls", corrupt=corrupt)
        _ = list(module.loader(length=2))
        assert any("cannot be read after" in record.getMessage() for record in warnings_of(caplog))


def test_labels_of_latents_that_are_no_numbers_of_numpy(tmp_path):
    tensors = {"latents": torch.zeros(3, 4, 2, 2), "labels": torch.zeros(3, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"labels of .*a\.safetensors has torch\.bfloat16: expected whole numbers"):
        _ = LatentArrays(str(tmp_path / "a.safetensors")).labels


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a pointer of git-lfs"),
        (b"<html>login</html>", "is a web page, not weights"),
        (b"", "is empty: the download or the copy broke off"),
    ],
)
def test_what_came_in_place_of_a_model_is_said(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors {message}"):
        load_model(tmp_path / "model.safetensors")


# -- as tools of others leave them -------------------------------------------------------------------------------------


@pytest.fixture
def listed(tmp_path) -> Path:
    """The layout of EDM2's and REPA's tools: folders that are no classes, and `dataset.json` with the labels."""
    root, labels = tmp_path / "edm2", []
    for i in range(6):
        name = f"{i // 3:05d}/img{i:08d}.png"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(root / name)
        labels.append([name, [4, 0, 2, 2, 0, 4][i]])
    (root / "dataset.json").write_text(json.dumps({"labels": labels[::-1]}))
    return root


def test_labels_of_dataset_json_count_and_not_its_folders(listed, caplog):
    found = ImageFolder(str(listed))
    assert found.labels.tolist() == [4, 0, 2, 2, 0, 4]
    assert found.read_classes()[1] == ["0", "1", "2", "3", "4"]
    assert [found.image(i).getpixel((0, 0))[0] for i in range(6)] == [0, 40, 80, 120, 160, 200]
    assert "labels of dataset.json" in found.line()
    assert not caplog.messages  # nothing is left out
    Image.new("RGB", (8, 8)).save(listed / "00001/other.png")
    assert len(ImageFolder(str(listed)).labels) == 6
    assert "1 images that dataset.json does not list (00001/other.png)" in caplog.text
    assert find_classes(listed).class_to_idx["4"] == 4  # what prepare-latents asks
    (listed / "dataset.json").write_text('{"labels": null}')
    found = ImageFolder(str(listed))
    assert (found.labels.tolist(), found.read_classes()[1]) == ([0] * 7, ["all"])
    assert found.image(3).getpixel((0, 0))[0] == 120
    assert "dataset.json has no labels" in found.line()
    (listed / "dataset.json").write_text('{"labels": [["00000')
    with pytest.raises(ValueError, match=r"dataset\.json is no JSON, so the labels are not known"):
        _ = ImageFolder(str(listed)).labels


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["00000/img00000000.png", 1.5], "expected a name and a label, a whole number"),
        (["00000/img00000000.png", True], "expected a name and a label, a whole number"),
        (["00000/img00000000.png", -1], "and a label from 0 on"),
        (["../other.png", 1], "expected a file in"),
        (["00000/./img00000000.png", 1], "lists 00000/img00000000.png twice, with the labels 4 and 1"),
        (["00000/none.png", 1], "1 of the 7 images that .*dataset.json lists are not there, the first 00000/none.png"),
    ],
)
def test_what_is_wrong_in_dataset_json_is_said(listed, row, message):
    labels = json.loads((listed / "dataset.json").read_text())["labels"]
    (listed / "dataset.json").write_text(json.dumps({"labels": [*labels, row]}))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        _ = ImageFolder(str(listed)).labels


def test_a_folder_above_latents_and_one_of_idx_files_say_what_to_give(tmp_path):
    (tmp_path / "repa/vae-sd").mkdir(parents=True)
    (tmp_path / "repa/vae-sd/dataset.json").write_text('{"labels": null}')
    with pytest.raises(ValueError, match=r"has no dataset\.json .*: .*repa/vae-sd has one, give that"):
        open_latents(str(tmp_path / "repa"))
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/train-images-idx3-ubyte").write_bytes(b"-")
    with pytest.raises(FileNotFoundError, match=r"such a folder is read by .*IdxImages \(the path of its images"):
        _ = ImageFolder(str(tmp_path / "raw")).labels


def test_labels_in_a_column_of_their_own_are_labels(tmp_path):
    """As MedMNIST has them."""
    labels = np.arange(5, dtype=np.uint8)[:, None]
    np.savez(tmp_path / "med.npz", train_images=np.zeros((5, 8, 8), np.uint8), train_labels=labels)
    found = NpzImages(str(tmp_path / "med.npz"), "train_images", "train_labels")
    assert found.labels.tolist() == [0, 1, 2, 3, 4]


def test_a_column_of_numbers_in_place_of_images_is_said(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"coarse": [1, 2], "label": [0, 1]}).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(ValueError, match=r"coarse has int64, no images: set image to the column .*\(coarse, label\)"):
        _ = HuggingFaceImages(str(tmp_path), image="coarse").labels


def test_samples_of_a_shard_whose_names_have_dots_or_that_have_no_label():
    sample = {"__url__": "a.tar", "__key__": "photo", "2020.0000.jpg": b"-", "2020.0001.jpg": b"-"}
    with pytest.raises(ValueError, match=r"a\.tar:photo has 2020\.0000\.jpg, .*names of samples have a dot"):
        Fields("jpg").check(sample)
    with pytest.raises(ValueError, match=r"has png, expected cls: .*or give no label .*\(label: null\)"):
        Fields("png", "cls").check({"__url__": "a.tar", "__key__": "0", "png": b"-"})


def test_moments_whose_name_says_so_are_no_latents(tmp_path):
    (tmp_path / "00000").mkdir()
    np.save(tmp_path / "00000/img-mean-std-00000000.npy", np.ones((8, 4, 4), np.float32))
    (tmp_path / "dataset.json").write_text('{"labels": [["00000/img-mean-std-00000000.npy", 0]]}')
    with pytest.raises(ValueError, match=r"img-mean-std-00000000\.npy: its name says mean and deviation: set holds"):
        _ = LatentDataModule(str(tmp_path), scale=0.2).state_shape
    assert LatentDataModule(str(tmp_path), scale=0.2, holds="mean_std").state_shape == (4, 4, 4)
