"""`ImageDataModule`: sources against their own readers, splits, pixels, the order of training, and its errors."""

import gzip
import logging
import struct
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.stats import chi2_contingency, chisquare
from sklearn.datasets import load_digits

from mfm_lightning.conditions import Conditions
from mfm_lightning.data import ImageDataModule, OffPolicyDataModule
from mfm_lightning.data.images import HuggingFaceImages, IdxImages, ImageFolder, NpzImages, TorchvisionImages
from mfm_lightning.data.order import KeyedPermutation, epoch_order
from mfm_lightning.utils.decoding import ImageError


def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits, `(1797, 8, 8)` uint8, and their labels."""
    found = load_digits()
    return (found.images * 255 / 16).round().astype(np.uint8), found.target.astype(np.int64)


def tree(root: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    """Class folders of PNG files."""
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = root / str(label) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return root


def idx(path: Path, array: np.ndarray) -> Path:
    content = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """300 digits in class folders."""
    images, labels = digits()
    return tree(tmp_path_factory.mktemp("digits"), images[:300], labels[:300])


# -- sources -----------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_as_torchvision_reads_it(folder):
    ours, theirs = ImageFolder(str(folder)), torchvision.datasets.ImageFolder(str(folder))
    assert ours.class_names == theirs.classes
    assert ours.labels.tolist() == theirs.targets
    for i in (0, 17, 299):
        assert np.array_equal(np.asarray(ours.image(i).convert("RGB")), np.asarray(theirs[i][0]))
    assert ours.line().startswith("300 images of 10 classes: 0 0, 1 1")


def test_a_flat_folder_is_one_class(tmp_path):
    for name in ("b.png", "a.png", ".hidden.png"):
        Image.fromarray(np.full((6, 6), ord(name[0]), np.uint8)).save(tmp_path / name)
    (tmp_path / ".cache").mkdir()
    data = ImageDataModule(str(tmp_path), batch_size=2, val_fraction=0, test_fraction=0)
    assert (data.num_classes, data.class_names, data.state_shape) == (1, ["all"], (1, 6, 6))
    x, label = data.train_batch(0)
    assert label.tolist() == [0, 0]
    assert sorted((data.decode(x)[:, 0, 0, 0] * 255).round().tolist()) == [ord("a"), ord("b")]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_is_read_as_torchvision_reads_it(ending, tmp_path):
    images, labels = digits()
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for part, rows in (("train", slice(0, 60)), ("t10k", slice(60, 80))):
        for name, array in (("images-idx3", images[rows]), ("labels-idx1", labels[rows].astype(np.uint8))):
            idx(raw / f"{part}-{name}-ubyte", array)
            idx(raw / f"{part}-{name}-ubyte.gz", array)
    ours = IdxImages(str(raw / f"train-images-idx3-ubyte{ending}"))
    theirs = torchvision.datasets.MNIST(str(tmp_path), train=True)
    assert ours.labels.tolist() == theirs.targets.tolist() == labels[:60].tolist()
    assert all(np.array_equal(np.asarray(ours.image(i)), theirs.data[i].numpy()) for i in range(60))
    named = TorchvisionImages("MNIST", str(tmp_path), split="test")
    assert named.class_names[3] == "3 - three"
    assert np.array_equal(np.asarray(named.image(5)), images[65])
    assert named.labels.tolist() == labels[60:80].tolist()


def test_npz_of_the_adm_layout(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 9, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", pixels, np.arange(12) % 4)
    data = ImageDataModule(str(tmp_path / "a.npz"), val_fraction=0, test_fraction=0)
    assert (data.state_shape, data.num_classes) == ((3, 9, 9), 4)
    x, label = data.splits["train"]
    assert torch.equal((data.decode(x) * 255).round().to(torch.uint8), torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
    assert label.tolist() == [0, 1, 2, 3] * 3
    assert (x.min(), x.max()) == (-1, 1)


def test_hugging_face_parquet_and_image_folders(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    images, labels = digits()
    features = datasets.Features({"picture": datasets.Image(), "y": datasets.ClassLabel(names=list("abcdefghij"))})
    rows = {"picture": [Image.fromarray(image) for image in images[:20]], "y": labels[:20].tolist()}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set/train.parquet")
    found = HuggingFaceImages(str(tmp_path / "set"), image="picture", label="y", cache=str(tmp_path / "cache"))
    assert found.class_names == list("abcdefghij")
    assert found.labels.tolist() == labels[:20].tolist()
    assert np.array_equal(np.asarray(found.image(7)), images[7])
    with pytest.raises(ValueError, match=r"columns picture, y, not 'image': set image"):
        _ = HuggingFaceImages(str(tmp_path / "set"), cache=str(tmp_path / "cache")).labels
    with pytest.raises(ValueError, match=r"datasets cannot open .*\(tset\)"):
        _ = HuggingFaceImages(str(tmp_path / "set"), split="tset", cache=str(tmp_path / "cache")).labels
    as_folder = HuggingFaceImages(str(folder), cache=str(tmp_path / "cache"))
    assert sorted(as_folder.labels.tolist()) == sorted(ImageFolder(str(folder)).labels.tolist())
    with pytest.raises(FileNotFoundError, match="download: true"):
        _ = HuggingFaceImages("someone/not_here").labels


@pytest.mark.parametrize(("memory", "workers"), [(2000.0, 0), (0.0, 0), (0.0, 2)])
def test_captions_of_hugging_face_become_prompts(tmp_path, memory, workers):
    """Of each image its own, in training, validation and `mfm predict`."""
    datasets = pytest.importorskip("datasets")
    features = {"image": datasets.Image(), "text": datasets.Value("string"), "n": datasets.Value("int64")}
    rows = {"image": [Image.fromarray(np.full((4, 4), i, np.uint8)) for i in range(12)], "n": list(range(12))}
    rows["text"] = [f" grey {i}\n" for i in range(12)]
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(tmp_path / "set/train.parquet")

    def source(**given) -> HuggingFaceImages:
        return HuggingFaceImages(str(tmp_path / "set"), label=None, cache=str(tmp_path / "cache"), **given)

    def check(x, given):
        numbers = ((x[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        conditions = Conditions.of_batch(given, len(x))
        assert conditions.prompts == tuple(f"grey {i}" for i in numbers)
        assert conditions.label.tolist() == [0] * len(x)
        return numbers

    given = {"source": source(caption="text"), "batch_size": 4, "memory": memory, "num_workers": workers}
    data = ImageDataModule(**given, val_fraction=0.5, test_fraction=0.0)
    seen = [number for step in range(3) for number in check(*data.batches()(step))]
    held_out = [number for batch in data.val_dataloader() for number in check(*batch)]
    assert sorted({*seen, *held_out}) == list(range(12))
    numbered = list(data.predict_dataloader())
    assert [n for batch in numbered for n in check(*batch)] == held_out
    assert torch.cat([batch[1]["index"] for batch in numbered]).tolist() == list(range(6))
    with pytest.raises(ValueError, match=r"columns image, n, text, not 'txt': set caption"):
        _ = source(caption="txt").labels
    with pytest.raises(ValueError, match="has no caption"):
        NpzImages("a.npz").caption(0)


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ([1, 2, 3], "text has int64, not a text each: set caption"),
        ([["a"], ["b", "c"], []], r"text has List\(.*string.*\), not a text each"),
        ([None, None, None], "text has null, not a text each"),
        (["a", None, None], r"image 1 of .*set \(train\) has no text \(2 of 3 have none\)"),
    ],
)
def test_captions_that_are_no_texts_are_refused_before_an_image_is_read(tmp_path, captions, message):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    rows = {"image": [{"bytes": b"none", "path": None}] * 3, "text": captions}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "set/train.parquet")
    source = HuggingFaceImages(str(tmp_path / "set"), label=None, caption="text", cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=message) as error:
        ImageDataModule(source, size=8, channels=1).setup("fit")
    assert "\n" not in str(error.value)


# -- pixels ------------------------------------------------------------------------------------------------------------


def test_size_crop_and_channels(photos, tmp_path):
    (tmp_path / "x").mkdir()
    for i, photo in enumerate(photos):
        photo.save(tmp_path / f"x/{i}.png")
    data = ImageDataModule(str(tmp_path), size=64, val_fraction=0, test_fraction=0)
    grey = ImageDataModule(str(tmp_path), size=64, channels=1, val_fraction=0, test_fraction=0)
    assert (data.state_shape, grey.state_shape) == ((3, 64, 64), (1, 64, 64))
    colour, found = (each.decode(each.splits["train"][0]) for each in (data, grey))
    # ADM's crop, in its own words: https://github.com/openai/guided-diffusion, image_datasets.py
    for i, photo in enumerate(photos):
        image = photo
        while min(*image.size) >= 2 * 64:
            image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
        scale = 64 / min(*image.size)
        array = np.array(image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC))
        y, x = (array.shape[0] - 64) // 2, (array.shape[1] - 64) // 2
        expected = torch.from_numpy(array[y : y + 64, x : x + 64]).permute(2, 0, 1) / 255
        assert torch.allclose(colour[i], expected, atol=1e-6)
        weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
        assert (found[i, 0] - (weights * expected).sum(0)).abs().max() < 1 / 255
    with pytest.raises(ValueError, match=r"640 x 427 pixels: give a size"):
        _ = ImageDataModule(str(tmp_path)).state_shape


def test_mixed_images_are_refused_unless_told(tmp_path):
    Image.new("L", (6, 6)).save(tmp_path / "a.png")
    Image.new("RGB", (6, 6)).save(tmp_path / "b.png")
    options = {"batch_size": 2, "val_fraction": 0, "test_fraction": 0}
    with pytest.raises(ImageError, match=r"b\.png is in colour, the first image is grey: give channels"):
        ImageDataModule(str(tmp_path), **options).setup("fit")
    assert ImageDataModule(str(tmp_path), channels=3, **options).train_batch(0)[0].shape == (2, 3, 6, 6)
    Image.new("RGB", (8, 6)).save(tmp_path / "c.png")
    with pytest.raises(ImageError, match=r"c\.png has 8 x 6 pixels, the first 6 x 6: give a size"):
        ImageDataModule(str(tmp_path), channels=3, **options).setup("fit")


def test_mirror_images_are_half_of_them(folder):
    data = ImageDataModule(str(folder), batch_size=200, mirror=True)
    plain = ImageDataModule(str(folder), batch_size=200)
    (x, label), (y, same) = data.train_batch(3), plain.train_batch(3)
    assert torch.equal(label, same)
    flipped, kept = ((x == other).flatten(1).all(1) for other in (y.flip(-1), y))
    assert (flipped | kept).all()
    assert 60 < flipped.sum() < 140
    assert torch.equal(x, ImageDataModule(str(folder), batch_size=200, mirror=True).train_batch(3)[0])


# -- splits ------------------------------------------------------------------------------------------------------------


def test_held_out_images_are_a_tenth_of_each_class_and_the_same_for_all_seeds(folder):
    data, other = (ImageDataModule(str(folder), seed=seed) for seed in (0, 1))
    rows = {name: set(part.rows.tolist()) for name, part in data.parts.items()}
    assert sum(map(len, rows.values())) == len(set().union(*rows.values())) == 300
    total = np.bincount(data.sources["train"].labels)
    for name in ("val", "test"):
        assert np.abs(np.bincount(data.parts[name].labels, minlength=10) - total / 10).max() <= 1
        assert rows[name] == set(other.parts[name].rows.tolist())


def test_folders_of_their_own_and_labels_by_name(folder, tmp_path):
    images, labels = digits()
    later = labels[300:] >= 4
    val = tree(tmp_path / "val", images[300:][later][:50], labels[300:][later][:50])
    data = ImageDataModule(str(folder), val_source=str(val), test_fraction=0)
    assert len(data.parts["train"]) == 300
    assert sorted(data.splits["val"][1].tolist()) == sorted(labels[300:][later][:50].tolist())
    assert torch.equal(data.splits["test"][0], data.splits["val"][0])
    (val / "dog").mkdir()
    Image.fromarray(images[0]).save(val / "dog/a.png")
    with pytest.raises(ValueError, match="val_source has a class 'dog', which the training images do not have"):
        _ = ImageDataModule(str(folder), val_source=str(val)).parts


@pytest.mark.parametrize("classes", [[3, 8], ["3", "8"]])
def test_classes_are_kept_and_not_renamed(classes, folder):
    data = ImageDataModule(str(folder), classes=classes)
    assert data.num_classes == 10
    assert {int(label) for name in data.splits for label in data.splits[name][1]} == {3, 8}
    assert data.summary().endswith("classes kept: 3, 8")


# -- order -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5, 10, 97, 1024, 1797, 60_000])
def test_it_is_a_permutation(n):
    for key in range(3):
        assert np.array_equal(np.sort(KeyedPermutation(n, 0, key)(np.arange(n))), np.arange(n))


def test_imagenet_is_permuted_in_batches_of_any_place():
    n = 1_281_167
    whole = epoch_order(n, 0, n, seed=5)
    assert len(np.unique(whole)) == n
    assert np.array_equal(epoch_order(n, 700_000, 256, seed=5), whole[700_000:700_256])


@pytest.mark.parametrize("n", [6, 100, 1797])
def test_each_place_has_each_number_alike_often(n):
    """Chi-square over keys of what stands at the first, a middle and the last place."""
    keys = 4000
    for place in (0, n // 2, n - 1):
        found = np.array([KeyedPermutation(n, 11, key)(np.array([place]))[0] for key in range(keys)])
        counts = np.bincount(found * min(n, 20) // n, minlength=min(n, 20))
        expected = np.bincount(np.arange(n) * min(n, 20) // n) * keys / n
        assert chisquare(counts, expected).pvalue > 1e-4


@pytest.mark.parametrize("n", [1797, 60_000])
def test_an_order_is_as_random_as_a_shuffle(n):
    """Chi-square of place against number, of neighbours against each other, and of one epoch against the next."""
    first, second = KeyedPermutation(n, 0, 0)(np.arange(n)), KeyedPermutation(n, 0, 1)(np.arange(n))
    for a, b in ((np.arange(n), first), (first[:-1], first[1:]), (first, second)):
        table = np.zeros((12, 12))
        np.add.at(table, (a * 12 // n, b * 12 // n), 1)
        assert chi2_contingency(table).pvalue > 1e-4
    assert (first == np.arange(n)).sum() < 8  # a Poisson number of mean 1


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 7), (3, 5), (4, 16), (8, 100)])
def test_an_epoch_has_each_image_once_on_any_number_of_ranks(world_size, batch_size, folder):
    data = ImageDataModule(str(folder), batch_size=batch_size)
    n = len(data.parts["train"])
    ranks = [data.batches(rank, world_size) for rank in range(world_size)]
    steps = -(-3 * n // (world_size * batch_size))
    line = np.concatenate([rank.index(step) for step in range(steps) for rank in ranks])
    for epoch in range(3):
        assert np.array_equal(np.sort(line[epoch * n : (epoch + 1) * n]), np.arange(n))
    assert not np.array_equal(line[:n], line[n : 2 * n])


class _Recorder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []
        self.automatic_optimization = True

    def training_step(self, batch, _):
        self.seen.append(batch[1].tolist())
        return self.weight * batch[0].mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def _train(data: ImageDataModule, steps: int, root: Path, ckpt_path: Path | None = None):
    trainer = L.Trainer(
        max_steps=steps, logger=False, default_root_dir=root, accelerator="cpu", max_epochs=-1,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    module = _Recorder()
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=False)
    trainer.save_checkpoint(root / "last.ckpt")
    return module.seen


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_what_it_would_have_seen(workers, folder, tmp_path, caplog):
    options = {"batch_size": 64, "mirror": True, "val_fraction": 0, "test_fraction": 0}
    whole = _train(ImageDataModule(str(folder), **options), 9, tmp_path)
    memory = {"memory": 0, "num_workers": workers}
    with caplog.at_level(logging.WARNING):
        first = _train(ImageDataModule(str(folder), **options, **memory), 4, tmp_path)
        rest = _train(ImageDataModule(str(folder), **options, **memory), 9, tmp_path, tmp_path / "last.ckpt")
    assert first + rest == whole
    assert f"decoded for each batch by {f'{workers} workers' if workers else 'the process itself'}" in caplog.text
    _train(ImageDataModule(str(folder), **{**options, "batch_size": 32}), 10, tmp_path, tmp_path / "last.ckpt")
    assert "batch_size 64 to 32" in caplog.text


def test_images_serve_fine_tuning(folder):
    """`OffPolicyDataModule` over images has their splits and their shape."""
    data = ImageDataModule(str(folder), batch_size=8)
    mixed = OffPolicyDataModule(data, policy_share=0.0)
    assert (mixed.state_shape, mixed.num_classes) == ((1, 8, 8), 10)
    assert torch.equal(mixed.train_batch(2)[0], data.train_batch(2)[0])
    assert len(mixed.splits["train"][0]) == 240
    assert {name: int(count.sum()) for name, count in data.label_counts().items()} == {
        "train": 240,
        "val": 30,
        "test": 30,
    }


# -- memory, loaders, errors -------------------------------------------------------------------------------------------


def test_what_fits_is_decoded_once_and_says_so(folder, caplog):
    data = ImageDataModule(str(folder))
    with caplog.at_level(logging.INFO):
        data.setup("fit")
    assert "train: 240 images decoded into 0.0154 MB of memory" in caplog.text
    assert data.in_memory
    assert ImageDataModule(str(folder), memory=0.01).splits is None


def test_loaders_have_all_held_out_images_with_their_index(folder):
    for options in ({}, {"memory": 0, "num_workers": 1}):
        data = ImageDataModule(str(folder), batch_size=16, **options)
        expected = ImageDataModule(str(folder)).splits
        x, label = (torch.cat(part) for part in zip(*data.val_dataloader(), strict=True))
        assert torch.equal(x, expected["val"][0])
        assert torch.equal(label, expected["val"][1])
        batches = list(data.predict_dataloader())
        assert torch.cat([given["index"] for _, given in batches]).tolist() == list(range(len(expected["test"][0])))
        assert torch.equal(torch.cat([x for x, _ in batches]), expected["test"][0])
    assert ImageDataModule(str(folder), val_fraction=0, test_fraction=0).val_dataloader() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_in_one_line(workers, folder, tmp_path):
    images, labels = digits()
    root = tree(tmp_path / "x", images[:40], labels[:40])
    path = root / "3/0003.png"
    path.write_bytes(path.read_bytes()[:60])
    data = ImageDataModule(str(root), batch_size=40, memory=0, num_workers=workers, val_fraction=0, test_fraction=0)
    with pytest.raises(ImageError, match=r"0003\.png cannot be decoded") as caught:
        _train(data, 1, tmp_path)
    assert "\n" not in str(caught.value)
    assert "3/00" in data.origin(0) or "/0" in data.origin(0)


def test_wrong_settings_and_files(tmp_path):
    images, labels = digits()
    root = tree(tmp_path / "x", images[:40], labels[:40])
    for options, message in (
        ({"channels": 2}, r"channels 2: expected 1 \(grey\) or 3"),
        ({"size": 0}, "size 0 must be at least 1"),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "less than 1 together"),
        ({"classes": []}, "leave no image"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"classes": ["dog"]}, r"no class 'dog' \(there are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\)"),
        ({"test_source": str(tmp_path / "nowhere")}, "no images at .*nowhere: expected a folder"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            _ = ImageDataModule(str(root), **options).parts
    text = tmp_path / "a.txt"
    text.write_text("x")
    with pytest.raises(ValueError, match=r"none of a folder of images, an \.npz, and an IDX file"):
        ImageDataModule(str(text))
    short = idx(tmp_path / "images-idx3-ubyte", images[:4])
    with pytest.raises(FileNotFoundError, match=r"no labels at .*labels-idx1-ubyte"):
        _ = IdxImages(str(short)).labels
    short.write_bytes(short.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"has 271 bytes, its header says 272 \(\(4, 8, 8\)\)"):
        _ = IdxImages(str(short), labels=str(short)).labels
    np.savez(tmp_path / "a.npz", x=images)
    with pytest.raises(ValueError, match="it has x, not 'arr_0'"):
        _ = NpzImages(str(tmp_path / "a.npz")).labels
    np.savez(tmp_path / "a.npz", images.astype(np.float32))
    with pytest.raises(ValueError, match=r"float32 \(1797, 8, 8\): expected uint8"):
        _ = NpzImages(str(tmp_path / "a.npz")).labels
    with pytest.raises(ValueError, match="no data set 'MNSIT': did you mean MNIST"):
        _ = TorchvisionImages("MNSIT").labels
    with pytest.raises(FileNotFoundError, match=r"torchvision's CIFAR10 \(train\) is not in .*download: true"):
        _ = TorchvisionImages("CIFAR10", str(tmp_path)).labels
