"""What is read by its ending, what is left out with a word, and what is refused: in folders and in tars."""

import bz2
import errno
import gzip
import lzma
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mfm_lightning.utils.decoding import image_endings
from mfm_lightning.utils.images import ImageSet
from tests.inputs.pictures import brightness, encoded, mfm, moments, picture, prepare, refused, save, shard, write

PACKED = {"tar": bytes, "tar.gz": gzip.compress, "tgz": gzip.compress, "tar.bz2": bz2.compress, "tar.xz": lzma.compress}
KINDS = {  # endings of one kind of file, and what Pillow calls it
    "PNG": ("png", "PNG"), "JPEG": ("jpg", "jpeg", "JPG", "jfif", "jpe"), "GIF": ("gif",), "WEBP": ("webp",),
    "TIFF": ("tif", "tiff"), "BMP": ("bmp", "dib"), "PPM": ("ppm", "pnm"), "AVIF": ("avif",),
    "JPEG2000": ("jp2", "j2k"), "TGA": ("tga",), "ICO": ("ico",),
}  # fmt: skip
ENDINGS = [(kind, ending) for kind, endings in KINDS.items() for ending in endings]


def samples(first: int, number: int = 2, ending: str = "png") -> dict[str, bytes]:
    """Files of so many samples of a shard, each of class 0."""
    found = {}
    for i in range(first, first + number):
        found |= {f"{i:04d}.{ending}": encoded(picture(20, i)), f"{i:04d}.cls": b"0"}
    return found


@pytest.mark.parametrize(("kind", "ending"), ENDINGS)
def test_what_pillow_reads_is_read(kind, ending, tmp_path, capsys):
    """By the reward, the set of images, and in shards: the same pixels."""
    content = encoded(picture(16), kind)
    write(tmp_path / "x" / f"a.{ending}", content)
    assert list(brightness(tmp_path / "x", capsys).values()) == [pytest.approx(picture(16).mean() / 255, abs=0.02)]
    (from_folder,) = ImageSet(tmp_path / "x").batches()
    shard(tmp_path / "tars/a.tar", {f"0.{ending}": content, "0.cls": b"0"})
    (from_tar,) = ImageSet(tmp_path / "tars").batches()
    assert torch.equal(from_folder, from_tar)
    assert np.abs(from_folder[0].permute(1, 2, 0).numpy().astype(int) - picture(16)).mean() < 12


def test_every_ending_of_images_is_lower_case_and_known_to_pillow():
    assert {".png", ".jpg", ".jfif", ".gif", ".tif", ".avif", ".ppm", ".webp"} <= image_endings()
    assert not {".eps", ".ps", ".pdf", ".h5", ".npz", ".txt", ".json", ".mpg", ".heic"} & image_endings()
    assert all(ending == ending.lower() for ending in image_endings())


def test_mixed_kinds_are_one_set(made, fid, tmp_path, capsys):
    for i in range(4):
        save(tmp_path / "x/c" / f"{i}.png", picture(20, i))
        save(tmp_path / "x/c" / f"{i}t.tif", picture(20, 9 + i))
    assert len(brightness(tmp_path / "x/c", capsys)) == 8
    assert prepare(made, tmp_path / "x", tmp_path / "out")[0] == 0
    assert len(moments(tmp_path / "out")) == 8
    status, said = fid(tmp_path / "x", None, "--output", tmp_path / "out.json")
    assert status == 0, said
    assert '"num_samples": 8' in (tmp_path / "out.json").read_text()
    assert "left out" not in said


def test_what_is_left_out_is_counted_and_named(made, fid, tmp_path):
    """By each command in one line; files of operating systems are no loss."""
    for i in range(3):
        save(tmp_path / "x/c" / f"{i}.png", picture(20, i))
        write(tmp_path / "x/c" / f"{i}.txt", b"a caption")
    for name in ("live.HEIC", "raw.CR2", "notes", "labels.json"):
        write(tmp_path / "x/c" / name, b"?")
    for name in (".DS_Store", "._0.png", "Thumbs.db", "desktop.ini", "__MACOSX/._0.png", ".hidden/0.png"):
        write(tmp_path / "x/c" / name, b"junk")
    for status, said in (
        prepare(made, tmp_path / "x", tmp_path / "out"),
        mfm("rewards", "--score", "brightness", "--images", tmp_path / "x/c", "--device", "cpu"),
        fid(tmp_path / "x"),
    ):
        assert status == 0, said
        line = next(line for line in said.splitlines() if "left out" in line)
        assert "7 files left out: 3 .txt, " in line
        for kind in ("1 .heic", "1 .cr2", "1 without ending", "1 .json"):
            assert kind in line
        assert not re.search("DS_Store|Thumbs|hidden|MACOSX|desktop", said)
    assert len(moments(tmp_path / "out")) == 3


def test_images_of_folders_below_are_counted_by_the_reward(tmp_path):
    save(tmp_path / "x/a.png", picture())
    save(tmp_path / "x/b/c.png", picture())
    said = mfm("rewards", "--score", "brightness", "--images", tmp_path / "x", "--device", "cpu")[1]
    assert "1 files left out: 1 images in its folders (b/c.png)" in said
    for place, message in (("x/b", "no images"), ("x/a.png", "is a file: expected a folder"), ("y", "no folder")):
        if place == "x/b":
            (tmp_path / "x/b/c.png").rename(tmp_path / "x/b/c.heic")
        images = tmp_path / place
        refused(mfm("rewards", "--score", "brightness", "--images", images, "--device", "cpu"), str(images), message)


# -- tars --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", PACKED)
def test_compressed_shards_are_read(ending, made, tmp_path):
    """By name and in a folder, beside plain ones; by `mfm fid`, too."""
    shard(tmp_path / "x/s0.tar", samples(0))
    plain = shard(tmp_path / "whole.tar", samples(2)).read_bytes()
    packed = write(tmp_path / f"x/s1.{ending}", PACKED[ending](plain))
    assert prepare(made, tmp_path / "x", tmp_path / "both")[0] == 0
    assert len(moments(tmp_path / "both")) == 4
    assert prepare(made, packed, tmp_path / "one")[0] == 0
    assert [key[-4:] for key in moments(tmp_path / "one")] == ["0002", "0003"]
    assert len(torch.cat(list(ImageSet(tmp_path / "x").batches()))) == 4


@pytest.mark.parametrize("ending", list(PACKED)[1:])
def test_a_compressed_shard_that_is_cut_off_is_named(ending, made, tmp_path):
    plain = shard(tmp_path / "whole.tar", samples(0, 6)).read_bytes()
    content = PACKED[ending](plain)
    packed = write(tmp_path / f"x/s1.{ending}", content[: 2 * len(content) // 3])
    refused(prepare(made, packed, tmp_path / "out"), f"shard {packed} cannot be read after")
    with pytest.raises(ValueError, match=rf"shard {packed} cannot be read: "):
        list(ImageSet(tmp_path / "x").batches())


@pytest.mark.parametrize("name", ["s.tar.zst", "s.tzst", "S.TAR.LZ4"])
def test_other_compressions_are_refused(name, made, fid, tmp_path):
    shard(tmp_path / "x/a.tar", samples(0))
    write(tmp_path / "x" / name, b"(\xb5/\xfd")
    for said in (
        prepare(made, tmp_path / "x", tmp_path / "out"),
        prepare(made, tmp_path / "x" / name, tmp_path / "out"),
        fid(tmp_path / "x"),
    ):
        refused(said, f"x/{name}: a tar of this compression is not read")


def test_a_shard_that_is_there_is_not_said_to_be_missing(made, tmp_path):
    write(tmp_path / "images.zip", b"PK")
    refused(prepare(made, tmp_path / "images.zip", tmp_path / "out"), "images.zip, which is no tar")
    refused(prepare(made, tmp_path / "none.zip", tmp_path / "out"), "none.zip, which is not there")
    refused(prepare(made, tmp_path / "none.tar.gz", tmp_path / "out"), "no shard", "none.tar.gz")


def test_tars_and_images_in_one_folder_are_refused(made, fid, tmp_path):
    shard(tmp_path / "x/a.tar", samples(0))
    save(tmp_path / "x/c/preview.png", picture())
    refused(prepare(made, tmp_path / "x", tmp_path / "out"), "has 1 tars, and images in c/")
    refused(fid(tmp_path / "x"), "has 1 images and 1 tars: give a folder of one kind")
    (tmp_path / "x/a.tar").unlink()
    np.savez(tmp_path / "x/samples.npz", np.zeros((2, 8, 8, 3), np.uint8))
    refused(fid(tmp_path / "x"), "has 1 images and samples.npz")


def test_junk_and_sidecars_in_tars(made, fid, tmp_path):
    """macOS adds `._` files; captions are left out with a word; in folders of a tar, too."""
    files = {"./.DS_Store": b"x", "./": b""} | {"./._0000.png": b"\0\5\26\7", "__MACOSX/._0000.png": b"\0\5"}
    for name, content in samples(0, 3, "JPEG").items():
        files[f"./{name}"] = content
        if name.endswith("cls"):
            files[f"./{name[:-3]}txt"] = b"a caption"
            files[f"./{name[:-3]}json"] = b"{}"
    files["README"] = b"?"
    del files["./"]
    shard(tmp_path / "x/a.tar", files)
    for status, said in (prepare(made, tmp_path / "x", tmp_path / "out"), fid(tmp_path / "x")):
        assert status == 0, said
        assert "7 files left out: 3 .txt, 3 .json, 1 without ending" in said
    assert len(moments(tmp_path / "out")) == 3


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.png": b"?", "0.jpg": b"?", "0.cls": b"0"}, "has png, jpg, cls: expected one image"),
        (
            {"a.png": b"?", "b.png": b"?", "a.cls": b"0", "b.cls": b"0"},
            "has png: expected one image (jpg, png, ...) and",
        ),
        ({"shot 2.0 (final).png": b"?", "shot 2.0 (final).cls": b"0"}, "all that follows the first dot"),
        ({"0.txt": b"?", "0.cls": b"0"}, "has txt, cls: expected one image"),
        ({"0.png": b"?", "0.cls": b"tench"}, "cls is b'tench', not a label"),
    ],
)
def test_samples_that_are_not_whole_are_named(files, message, made, tmp_path):
    path = shard(tmp_path / "in.tar", files)
    refused(prepare(made, path, tmp_path / "out"), f"of {path}", message)


def test_a_key_that_is_there_twice_is_refused(made, tmp_path):
    """One file after the other, further on in the shard, and of folders that differ by what a key cannot hold."""
    with tarfile.open(tmp_path / "next.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("0.png"))
    refused(prepare(made, tmp_path / "next.tar", tmp_path / "x"), "next.tar cannot be read after 0 samples: 0.png: dup")
    files = samples(0, 3)
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for content in (files, samples(0, 1)):
            shard(tmp_path / "part.tar", content)
            with tarfile.open(tmp_path / "part.tar") as part:
                for member in part:
                    tar.addfile(member, part.extractfile(member))
    refused(prepare(made, tmp_path / "in.tar", tmp_path / "out"), "in.tar: two samples have the key '0000'")
    shard(tmp_path / "dots.tar", {f"{f}/0.{e}": files[f"0000.{e}"] for f in ("v1.0", "v1_0") for e in ("png", "cls")})
    refused(prepare(made, tmp_path / "dots.tar", tmp_path / "dots"), "two samples have the key 'v1_0/0'")


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_in_tars_are_no_lost_images(kind, made, tmp_path):
    path = shard(tmp_path / "x/in.tar", samples(0, 1))
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("0001.png")
        member.type, member.linkname = kind, "0000.png"
        tar.addfile(member)
    refused(prepare(made, path, tmp_path / "out"), "in.tar cannot be read", "0001.png is a link")
    with pytest.raises(ValueError, match=r"0001\.png is a link or device"):
        list(ImageSet(tmp_path / "x").batches())


def test_replaced_shards_are_noticed(made, tmp_path):
    path = shard(tmp_path / "in.tar", samples(0, 2))
    assert prepare(made, path, tmp_path / "out")[0] == 0
    shard(path, samples(0, 3))
    refused(prepare(made, path, tmp_path / "out", "--verify"), "other files of the same names")


def test_a_plug_in_of_pillow_s_adds_its_endings(tmp_path, monkeypatch):
    """As pillow_heif does for .heic."""
    from PIL import BmpImagePlugin

    image_endings.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(Image.EXTENSION, ".heic", "BMP")
        assert ".heic" in image_endings()
        write(Path(tmp_path) / "a.heic", encoded(picture(16), "BMP"))
        assert ImageSet(tmp_path).number == 1
    image_endings.cache_clear()
    assert BmpImagePlugin is not None


@pytest.mark.parametrize("name", ["a[red].png", "b[bold]y.png", "c [1].png", "d\u00e9\u4e2d.png"])
def test_names_in_brackets_are_shown_as_they_are(name, fid, tmp_path, capsys):
    """For rich they would be styles: hidden, or an error."""
    for folder in ("x", "[bold]"):
        save(tmp_path / folder / name, picture())
        save(tmp_path / folder / "other.png", picture(40, 1))
    capsys.readouterr()
    status, said = mfm("rewards", "--score", "brightness", "--images", tmp_path / "[bold]", "--device", "cpu")
    assert status == 0, said
    assert name in capsys.readouterr().out
    assert fid(tmp_path / "[bold]", None)[0] == 0
    write(tmp_path / "x" / name, b"broken")
    said = mfm("rewards", "--score", "brightness", "--images", tmp_path / "x", "--device", "cpu")
    refused(said, f"{name} cannot be decoded")


def test_storage_that_fails_within_a_tar_is_named(made, tmp_path, monkeypatch):
    """Whatever is skipped; when it is back, nothing is missing."""
    path = shard(tmp_path / "x/a.tar", samples(0, 3))

    def fails(*_args, **_kwargs):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.ExFileObject, "read", fails)
        refused(prepare(made, path, tmp_path / "out", "--skip-broken"), f"shard {path} cannot be read", "output error")
        with pytest.raises(OSError, match=rf"shard {path} cannot be read \(Input/output error\)"):
            list(ImageSet(tmp_path / "x").batches())
    assert prepare(made, path, tmp_path / "out", "--skip-broken")[0] == 0
    assert len(moments(tmp_path / "out")) == 3
