"""What goes wrong with folders of images of one's own: said before training, by name, and never taken for something
else."""

import errno
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mfm_lightning.checkpoints import load_model
from mfm_lightning.commands.main import run
from mfm_lightning.data import ImageDataModule
from mfm_lightning.data.images import (
    CaptionedFolder,
    HuggingFaceImages,
    ImageFolder,
    LabelledImages,
    NpzImages,
    TorchvisionImages,
)
from mfm_lightning.data.images.splits import labels_of, stratified
from mfm_lightning.data.stream import WorkerStream
from mfm_lightning.utils.decoding import ImageError


def classes(root: Path, numbers: dict[str, int], size: int = 8) -> Path:
    """A folder of so many grey images for each class."""
    for name, number in numbers.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(number):
            Image.new("L", (size, size), 10 * i % 250).save(root / name / f"{i:03d}.png")
    return root


def test_a_class_is_its_name_and_a_number_with_two_meanings_is_refused(tmp_path):
    names = ["1", "2", "3", "10"]
    assert labels_of(["2", "10"], names) == [1, 3]
    assert labels_of([0], names) == [0]
    with pytest.raises(
        ValueError, match=r"2 is the label of '3' and the name of another class \(label 1\): give names"
    ):
        labels_of([2], names)
    root = classes(tmp_path, {"1": 10, "2": 10, "3": 10, "10": 10})
    data = ImageDataModule(str(root), classes=["2", "10"])
    assert data.summary().splitlines()[-1] == "classes kept: 1 2, 3 10"
    assert set(data.splits["train"][1].tolist()) == {1, 3}


def test_a_name_in_quotes_stays_a_name_on_the_command_line(tmp_path, monkeypatch):
    root = classes(tmp_path / "images", {"1": 20, "2": 20, "3": 20})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(
        "data: {class_path: mfm_lightning.data.ImageDataModule, "
        f"init_args: {{source: {root}, batch_size: 4, classes: ['2']}}}}\n"
    )
    run(["data", "--config", "c.yaml"])
    rows = json.loads(next(tmp_path.rglob("classes.json")).read_text())
    assert [row["train"] for row in rows] == [0, 16, 0]


@pytest.mark.parametrize("fractions", [[0.1, 0.1], [0.05], [0.45, 0.45], [0.0, 0.2]])
@pytest.mark.parametrize("sizes", [[4] * 200, [1] * 30 + [500], [1, 2, 3, 50]])
def test_small_classes_give_their_share_together_and_keep_one_each(sizes, fractions):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    parts = stratified(labels, fractions)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    assert (np.bincount(labels[parts[-1]], minlength=len(sizes)) >= 1).all()
    spare = len(labels) - len(sizes)  # one of each class stays
    for part, fraction in zip(parts, fractions, strict=False):
        assert (len(part) > 0) == (fraction > 0)
        if sum(fractions) * len(labels) < spare:  # else there are too few
            assert abs(len(part) - fraction * len(labels)) <= len(sizes) / 2


def test_large_classes_are_split_as_before():
    """Each its own fraction, rounded."""
    labels = np.repeat([0, 1], [100, 36])
    held_out, rest = stratified(labels, [0.05])
    assert np.bincount(labels[held_out]).tolist() == [5, 2]
    assert len(rest) == 129


def test_what_was_read_is_said_before_training(tmp_path, caplog):
    root = classes(tmp_path / "images", {"2": 20, "10": 20})
    with caplog.at_level(logging.INFO):
        ImageDataModule(str(root)).setup("fit")
    assert "train: 40 images of 2 classes (names are whole numbers, in numeric order): 0 2, 1 10" in caplog.messages
    (tmp_path / "index.json").write_text(json.dumps({"2": 0, "10": 1, "cow": 2}))
    caplog.clear()
    ImageDataModule(ImageFolder(str(root), str(tmp_path / "index.json"))).setup("fit")
    assert "no training images of 1 classes: 2 cow" in caplog.messages


def test_training_images_as_held_out_ones_are_said(tmp_path, caplog):
    """The same folder, and a copy; not other images of as many, nor other labels of the same file."""
    root = classes(tmp_path / "x", {"a": 20})
    shutil.copytree(root, tmp_path / "copy")
    other = classes(tmp_path / "other", {"a": 20})
    Image.new("L", (8, 8), 77).save(other / "a/019.png")
    ImageDataModule(str(root), val_source=f"{root}/.", test_source=str(other)).setup("fit")
    ImageDataModule(str(root), test_source=str(tmp_path / "copy")).setup("fit")
    images = np.zeros((4, 8, 8), np.uint8)
    np.savez(tmp_path / "k.npz", x_train=images, y_train=np.arange(4), x_test=images, y_test=np.array([0, 1, 3, 3]))
    train, test = (NpzImages(str(tmp_path / "k.npz"), f"x_{part}", f"y_{part}") for part in ("train", "test"))
    ImageDataModule(train, test_source=test, val_fraction=0).setup("fit")
    found = [message for message in caplog.messages if "training images" in message]
    end = "_source has the training images: what is measured on it is not of held-out ones"
    assert found == [f"{name}{end}" for name in ("val", "test")]


def test_a_run_goes_on_with_the_same_classes_alone(tmp_path, caplog):
    root = classes(tmp_path / "x", {"cat": 20, "dog": 20})

    def load(state: dict, trains: bool = True, **given) -> list[str]:
        data = ImageDataModule(str(root), **given)
        if not trains:
            data.trainer = SimpleNamespace(state=SimpleNamespace(fn="test"), global_rank=0, world_size=1)
        caplog.clear()
        data.load_state_dict(state)
        return caplog.messages

    saved = ImageDataModule(str(root)).state_dict()
    assert load(saved) == []
    assert load(saved, val_fraction=0.2)[0].startswith("other samples are held out than in the run before")
    (root / "cat").rename(root / "zebra")
    with pytest.raises(ValueError, match="'dog' had the label 1, and has 0 now; give the same ones, or begin a new"):
        load(saved)
    assert load(saved, trains=False)[0].startswith("the model was trained on other classes: 'dog' had the label 1")
    (root / "zebra").rename(root / "bat")
    assert load(saved) == ["classes have other names than in the run before: bat dog, before cat dog"]
    (root / "bat").rename(root / "cat")
    Image.new("L", (9, 9), 255).save(root / "cat/000.png")
    assert load(saved)[0].startswith("the training files are not as in the run before")
    older = {key: value for key, value in saved.items() if key not in ("class_names", "contents", "rows")}
    assert load(older) == []


def test_a_checkpoint_is_written_when_the_file_is_gone(tmp_path):
    np.savez(tmp_path / "k.npz", np.zeros((20, 8, 8), np.uint8), np.zeros(20, np.int64))
    data = ImageDataModule(str(tmp_path / "k.npz"))
    data.setup("fit")
    (tmp_path / "k.npz").unlink()
    assert data.state_dict()["images"] == 16


def test_changed_captions_and_labels_are_said(tmp_path, caplog):
    root = classes(tmp_path, {"a": 20}) / "a"
    for i in range(20):
        (root / f"{i:03d}.txt").write_text("a square")
    saved = ImageDataModule(CaptionedFolder(str(root))).state_dict()
    (root / "003.txt").write_text("a circle")
    ImageDataModule(CaptionedFolder(str(root))).load_state_dict(saved)
    assert "captions differ" in caplog.text


def test_held_out_images_that_do_not_fit_are_found_before_training(tmp_path):
    root = classes(tmp_path / "x", {"a": 20})
    other = classes(tmp_path / "y", {"a": 20}, size=9)
    for memory in (0.0, 100.0):
        with pytest.raises(ValueError, match=r"000\.png has 9 x 9 pixels, the first 8 x 8: give a size"):
            ImageDataModule(str(root), val_source=str(other), memory=memory).setup("fit")


def test_images_that_do_not_fit_in_memory_are_decoded_by_the_process_without_workers(tmp_path, caplog):
    ImageDataModule(str(classes(tmp_path, {"a": 20})), memory=0).setup("fit")
    assert "0.00128 MB decoded, more than memory: 0; they are decoded for each batch by the process" in caplog.text


def test_enlarged_images_are_said_once(tmp_path, caplog):
    data = ImageDataModule(str(classes(tmp_path, {"a": 20})), size=16, memory=0, num_workers=2)
    data.setup("fit")
    assert len(list(data.test_dataloader())) == 1  # by workers
    data.val_dataloader()
    found = [message for message in caplog.messages if "enlarged" in message]
    assert len(found) == 1
    assert "png has 8 x 8 pixels: images smaller than 16 are enlarged, of which this is the first" in found[0]
    caplog.clear()
    ImageDataModule(str(tmp_path), size=8).setup("fit")
    assert "enlarged" not in caplog.text


def test_labels_of_a_wrong_name_are_refused(tmp_path, caplog):
    np.savez(tmp_path / "k.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4))
    with pytest.raises(ValueError, match="it has images, labels, not 'lables'"):
        _ = NpzImages(str(tmp_path / "k.npz"), images="images", labels="lables").labels
    assert NpzImages(str(tmp_path / "k.npz"), images="images", labels="labels").labels.tolist() == [0, 1, 2, 3]
    assert NpzImages(str(tmp_path / "k.npz"), images="images").labels.tolist() == [0, 0, 0, 0]
    assert "its images are one class (its other arrays: labels)" in caplog.text


@pytest.mark.parametrize(("name", "reader"), [("a.parquet", "HuggingFaceImages"), ("a.tar", "WebDatasetDataModule")])
def test_a_folder_of_something_else_names_what_reads_it(tmp_path, name, reader):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=f"no images .*: such a folder is read by .*{reader}"):
        _ = ImageFolder(str(tmp_path)).labels
    (tmp_path / "a").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "a/0.png")
    (tmp_path / "b").mkdir()
    with pytest.raises(FileNotFoundError, match="no valid file for the classes b") as error:  # there are images
        _ = ImageFolder(str(tmp_path)).labels
    assert "is read by" not in str(error.value)


@pytest.mark.parametrize("splits", [False, True])
def test_what_save_to_disk_left_is_read(tmp_path, splits):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    pictures = [Image.new("L", (4, 4), i) for i in range(4)]
    found = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1, 1, 0]}, features=features)
    (datasets.DatasetDict(train=found) if splits else found).save_to_disk(tmp_path / "set")
    source = HuggingFaceImages(str(tmp_path / "set"))
    assert source.labels.tolist() == [0, 1, 1, 0]
    assert source.class_names == ["a", "b"]
    assert np.asarray(source.image(3))[0, 0] == 3
    with pytest.raises(
        ValueError, match="has the splits train: set split" if splits else "without a name: set split: train"
    ):
        _ = HuggingFaceImages(str(tmp_path / "set"), split="val").labels


def test_classes_without_training_images_are_not_sampled(tmp_path, monkeypatch, caplog):
    """As a user would: two of three classes are trained, and `mfm sample` draws those."""
    root = classes(tmp_path / "images", {"a": 20, "b": 20, "c": 20})
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 16, "depth": 1, "encoder_depth": 1, "num_heads": 2}
    small = [f"--model.network.{name}={number}" for name, number in sizes.items()]
    run([
        "fit", "--config", "pictures/mfm", "--data.source", str(root), "--data.classes", "[a, c]", "--data.size", "8",
        "--data.batch_size", "4", "--trainer.max_steps", "2", "--trainer.val_check_interval", "2",
        "--trainer.limit_val_batches", "0", "--trainer.accelerator", "cpu", *small,
    ])  # fmt: skip
    model = next(tmp_path.rglob("model.safetensors"))
    assert load_model(str(model)).untrained_labels == [1]
    options = ["--num-samples", "4", "--steps", "1", "--device", "cpu"]
    run(["sample", str(model), "--output", "s", *options])
    assert json.loads(next((tmp_path / "s").rglob("samples.json")).read_text())["labels"] == [0, 2]
    assert "labels 1 had no training images and are left out" in caplog.text
    run(["sample", str(model), "--output", "t", "--labels", "1", *options])
    assert "labels 1 had no training images: their samples mean little" in caplog.text


DAMAGED = [("a", 1), ("a", 2), ("b", 3)]  # of four images each: 1, 2 and 7


def damaged(root: Path) -> Path:
    """Two classes of four images of one level each, 10 i of the i-th of all; the first class's last three are cut off,
    no image, and, in the second, empty."""
    for k, name in enumerate("ab"):
        (root / name).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (8, 8), 10 * (4 * k + i)).save(root / name / f"{i}.png")
    (root / "a/1.png").write_bytes((root / "a/1.png").read_bytes()[:50])
    (root / "a/2.png").write_text("<html>not found</html>")
    (root / "b/3.png").write_bytes(b"")
    return root


def levels(x):
    """Which of the images of `damaged` states are, `(B,)`."""
    return ((x[:, 0, 0, 0] + 1) * 127.5 / 10).round().int().tolist()


@pytest.mark.parametrize("options", [{}, {"memory": 0.0}, {"memory": 0.0, "num_workers": 2}])
def test_another_of_its_class_takes_the_place_of_a_damaged_image(tmp_path, options, caplog):
    """Always the same one; without workers each file is decoded once."""
    data = ImageDataModule(
        str(damaged(tmp_path)), batch_size=8, val_fraction=0, test_fraction=0, corrupt="skip", **options
    )
    data.setup("fit")
    batches, workers = data.batches(), options.get("num_workers", 0)
    stream = list(WorkerStream(batches, workers, 3)) if workers else [batches(step) for step in range(3)]
    for x, label in stream:
        found = levels(x)
        assert sorted(found) == sorted(levels(stream[0][0]))
        assert label.tolist() == [int(level >= 4) for level in found]
        assert sum(level < 4 for level in found) == 4
        assert {0, 3, 4, 5, 6} == set(found)
    again, given = batches(1)
    assert (levels(again), given.tolist()) == (levels(stream[1][0]), stream[1][1].tolist())
    assert data.skipped == len(DAMAGED)
    data.teardown("fit")
    if not workers:  # else they are told by the workers
        for name, i in DAMAGED:
            assert caplog.text.count(f"skipped: {tmp_path / name / str(i)}.png cannot be decoded") == 1
    assert "images skipped, for they cannot be decoded: 3" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_class_without_an_image_that_can_be_decoded_is_named_and_its_place_spread(tmp_path, num_workers, caplog):
    """300 of 600, one after the other, in chunks of several workers; no other image is taken too often (32 of 300
    independent draws for one of 300: of a chance below 1e-30)."""
    source = Damaged(600, range(200, 500))
    data = ImageDataModule(source, val_fraction=0, test_fraction=0, corrupt="skip", num_workers=num_workers)
    assert data.label_counts()["train"].tolist() == [200, 300, 100]
    x, label = data.splits["train"]
    found = ((x[:, 0, 0, 0] + 1) * 127.5).round().int() + 256 * ((x[:, 0, 0, 1] + 1) * 127.5).round().int()
    assert found[:200].tolist() == list(range(200))
    assert found[500:].tolist() == list(range(500, 600))
    assert not set(found.tolist()) & set(range(200, 500))
    assert label.tolist() == [0 if i < 200 else 2 for i in found.tolist()]
    assert found.bincount().max() < 32
    batch, given = data.batches()(0)
    numbers = ((batch[:, 0, 0, 0] + 1) * 127.5).round().int() + 256 * ((batch[:, 0, 0, 1] + 1) * 127.5).round().int()
    assert given.tolist() == [0 if i < 200 else 2 for i in numbers.tolist()]
    assert data.skipped == 300
    assert data.label_counts()["train"][1] == 0
    message = "train: 300 of 600 images cannot be decoded, others are taken in their place; none is left of 1"
    assert message in caplog.text
    if not num_workers:
        assert set(source.decoded[200:500]) == {1}  # however many are damaged


class Damaged(LabelledImages):
    """So many images of 2 x 2 pixels, the first two of which tell the image's number; those of a range cannot be
    decoded. Classes: before, of, and after the range."""

    def __init__(self, number, broken):
        self.number, self.broken, self.decoded = number, broken, [0] * number

    def read_classes(self):
        labels = np.array([0 if i < self.broken.start else 1 if i in self.broken else 2 for i in range(self.number)])
        return labels, ["0", "1", "2"]

    def image(self, i):
        self.decoded[i] += 1 if i else 0  # the first also says size and colour
        if i in self.broken:
            raise ImageError(f"{self.place(i)} cannot be decoded")
        return Image.fromarray(np.array([[i % 256, i // 256], [0, 0]], dtype=np.uint8))

    def place(self, i):
        return f"image {i}"


def test_mfm_data_tells_what_is_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    root = damaged(tmp_path / "images")
    for corrupt in ("raise", "skip"):
        (tmp_path / "c.yaml").write_text(
            "data: {class_path: mfm_lightning.data.ImageDataModule, init_args: "
            f"{{source: {root}, batch_size: 4, val_fraction: 0, test_fraction: 0, corrupt: {corrupt}}}}}\n"
        )
        if corrupt == "raise":
            with pytest.raises(ImageError, match=r"a/1\.png cannot be decoded: .*; corrupt: skip takes another image"):
                run(["data", "--config", "c.yaml"])
            continue
        run(["data", "--config", "c.yaml"])
    text = capsys.readouterr().out
    assert "sizes of 8 of the images: 8 x 8 grey (5), cannot be decoded (3)" in text
    assert "skipped of what was read, for it cannot be decoded: 3" in text


def test_without_skip_a_damaged_image_ends_the_run_and_the_way_on_is_told(tmp_path):
    data = ImageDataModule(str(damaged(tmp_path)), val_fraction=0, test_fraction=0)
    with pytest.raises(ImageError, match=r"a/1\.png cannot be decoded: .*; corrupt: skip takes another image"):
        data.setup("fit")


def test_skip_is_of_damaged_images_alone(tmp_path):
    """Not of images of another size, which may be as many as one likes, and not of none at all."""
    with pytest.raises(ValueError, match="corrupt 'leave': expected one of raise, skip"):
        ImageDataModule(str(damaged(tmp_path / "some")), corrupt="leave")  # pyright: ignore[reportArgumentType]
    Image.new("L", (9, 9)).save(tmp_path / "some/b/0.png")
    data = ImageDataModule(str(tmp_path / "some"), val_fraction=0, test_fraction=0, corrupt="skip")
    with pytest.raises(ImageError, match=r"b/0\.png has 9 x 9 pixels, the first 8 x 8"):
        data.setup("fit")
    for path in (tmp_path / "some").rglob("*.png"):
        path.write_bytes(b"")
    data = ImageDataModule(str(tmp_path / "some"), size=8, channels=1, val_fraction=0, test_fraction=0, corrupt="skip")
    with pytest.raises(ImageError, match=r"a/0\.png cannot be decoded, nor can 64 others of the 8 train images"):
        data.setup("fit")


def test_size_and_colour_are_of_the_first_image_that_can_be_decoded(tmp_path):
    (damaged(tmp_path) / "a/0.png").write_bytes(b"")
    assert ImageDataModule(str(tmp_path), corrupt="skip").state_shape == (1, 8, 8)
    with pytest.raises(ImageError, match=r"a/0\.png cannot be decoded: .*; corrupt: skip takes another image"):
        assert ImageDataModule(str(tmp_path)).state_shape


def test_a_damaged_image_among_the_first_and_last_does_not_hide_that_two_sources_are_one(tmp_path, caplog):
    root = damaged(tmp_path)
    data = ImageDataModule(str(root), val_source=str(root), test_fraction=0, corrupt="skip")
    data.setup("fit")
    assert "val_source has the training images" in caplog.text


def test_a_storage_that_fails_is_no_damaged_image_of_torchvisions_either(monkeypatch):
    source = TorchvisionImages("MNIST", "data")
    for error, kind in ((OSError(errno.EIO, "Input/output error"), OSError), (OSError("truncated"), ImageError)):

        class Failing:
            def __getitem__(self, i, error=error):
                raise error

        monkeypatch.setitem(source.__dict__, "_dataset", Failing())
        with pytest.raises(kind) as raised:
            source.image(0)
        assert isinstance(raised.value, ImageError) == (kind is ImageError)
