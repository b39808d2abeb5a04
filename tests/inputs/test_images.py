"""Images of all kinds give the pixels that they show, the same in each command; broken ones are named."""

import errno
import os
import resource
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from mfm_lightning.utils import decoding
from mfm_lightning.utils.decoding import ImageError, ReadError, center_crop, decode, read_image
from mfm_lightning.utils.images import ImageSet
from tests.inputs.pictures import (
    brightness,
    empty_png,
    encoded,
    mfm,
    moments,
    packed_12_bits,
    picture,
    png,
    prepare,
    refused,
    save,
    shard,
    tiff,
    write,
)

GREY = picture(24)[..., 0]
WIDE = GREY.astype(np.uint16) * 257  # the same in 16 bits
TWELVE = np.round(GREY / 255 * 4095).astype(np.uint16)
DEEP = {  # a picture of more than 8 bits a channel, as the file's name and content
    "png grey": ("a.png", png(WIDE, 0)),
    "png grey alpha": ("a.png", png(np.stack([WIDE, WIDE[::-1]], -1), 4)),
    "tiff": ("a.tif", tiff(WIDE.astype("<u2").tobytes(), WIDE.shape)),
    "tiff, white is 0": ("a.tiff", tiff((65535 - WIDE).astype("<u2").tobytes(), WIDE.shape, photometric=0)),
    "tiff of 12 bits": ("a.tif", tiff(packed_12_bits(TWELVE), WIDE.shape, bits=12)),
    "tiff of floats": ("a.tif", tiff((GREY / 255).astype("<f4").tobytes(), WIDE.shape, 32, sample_format=3)),
    "pgm": ("a.pgm", b"P5 24 24 65535\n" + WIDE.astype(">u2").tobytes()),
    "pgm of 10 bits": ("a.pgm", b"P5 24 24 1023\n" + np.round(GREY / 255 * 1023).astype(">u2").tobytes()),
    "pfm": ("a.pfm", b"Pf\n24 24\n-1.0\n" + (GREY / 255).astype("<f4")[::-1].tobytes()),
    "jpeg 2000": ("a.jp2", encoded(WIDE, "JPEG2000")),
}


@pytest.mark.parametrize("kind", DEEP)
def test_more_than_8_bits_are_scaled_by_their_range(kind):
    name, content = DEEP[kind]
    image = decode(content, name)
    assert image.mode == ("RGB" if kind == "png grey alpha" else "L")  # as Pillow has that one
    assert np.abs(np.asarray(image.convert("RGB")).astype(int) - GREY[..., None]).max() <= 1


def test_16_bits_are_the_picture_that_8_are_in_every_command(made, fid, tmp_path, capsys):
    """The mean in numpy for the reward; for shards and FID, what the twin of 8 bits gives."""
    for name, (ending, content) in {k: v for k, v in DEEP.items() if k in ("png grey", "tiff", "pgm")}.items():
        write(tmp_path / "deep/c" / f"{name.replace(' ', '_')}{Path(ending).suffix}", content)
    colour = picture(24, 1)
    write(tmp_path / "deep/c/rgb.png", png(colour.astype(np.uint16) * 257, 2))
    for name in ("png_grey", "tiff", "pgm"):
        save(tmp_path / "plain/c" / f"{name}.png", GREY)
    save(tmp_path / "plain/c/rgb.png", colour)
    scores = brightness(tmp_path / "deep/c", capsys)
    assert scores["rgb"] == pytest.approx(colour.mean() / 255, abs=1e-3)
    for name in ("png_grey", "tiff", "pgm"):
        assert scores[name] == pytest.approx(GREY.mean() / 255, abs=1e-3)
    for which in ("deep", "plain"):
        assert prepare(made, tmp_path / which, tmp_path / f"{which}-shards")[0] == 0
    deep, plain = (moments(tmp_path / f"{which}-shards") for which in ("deep", "plain"))
    for key, (_, array) in deep.items():
        np.testing.assert_array_equal(array, plain[key.rsplit("_", 1)[0] + "_png"][1])
    status, said = fid(tmp_path / "deep", tmp_path / "plain", "--output", tmp_path / "fid.json")
    assert status == 0, said
    assert abs(float((tmp_path / "fid.json").read_text().split('"fid": ')[1].split(",")[0])) < 1e-3


def test_checks_of_a_reward_take_the_same_images(tmp_path, capsys):
    for name in ("png grey", "tiff", "pgm"):
        write(tmp_path / "x" / f"{name[:3]}{Path(DEEP[name][0]).suffix}", DEEP[name][1])
    check = ("rewards", "--check", "brightness", "--images", tmp_path / "x", "--device", "cpu")
    assert mfm(*check)[0] == 0
    assert capsys.readouterr().out.count("passed") == 8
    write(tmp_path / "x/png.png", BROKEN["cut.png"])
    refused(mfm(*check), f"{tmp_path}/x/png.png cannot be decoded")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tiff(GREY.astype("<f4").tobytes(), GREY.shape, 32, sample_format=3), "expected 0..1"),
        (tiff((GREY / 255 - 0.5).astype("<f4").tobytes(), GREY.shape, 32, sample_format=3), "floats in -0.5..0.3"),
        (tiff((GREY * np.nan).astype("<f4").tobytes(), GREY.shape, 32, sample_format=3), "floats in nan"),
        (tiff((WIDE // 2).astype("<i2").tobytes(), GREY.shape, sample_format=2), "of unknown range"),
        (tiff(WIDE.astype("<u4").tobytes(), GREY.shape, 32), "of unknown range"),
    ],
)
def test_numbers_of_unknown_range_are_refused(content, message, tmp_path):
    write(tmp_path / "x/deep.tif", content)
    said = mfm("rewards", "--score", "brightness", "--images", tmp_path / "x", "--device", "cpu")
    refused(said, "deep.tif cannot be decoded", message)


def test_modes_show_what_torchvision_shows(caplog):
    """Transparency is dropped, EXIF not applied, the first frame taken: said once each; CMYK is converted."""
    decoding._said.cache_clear()
    colour = picture(16, 2)
    rgba = np.dstack([colour, np.full((16, 16), 9, np.uint8)])
    palette = Image.fromarray(colour).quantize(16)
    palette.info["transparency"] = 3
    files = {
        "rgba.png": (encoded(rgba), colour),
        "cmyk.tif": (None, colour),
        "one.png": (encoded(GREY > 99), (GREY > 99) * 255),
        "la.png": (encoded(np.dstack([GREY, GREY // 2]), "PNG"), GREY),
        "grey.gif": (encoded(GREY, "GIF"), GREY),
    }
    files["cmyk.tif"] = (_saved(Image.fromarray(colour).convert("CMYK"), "TIFF"), colour)
    files["palette.png"] = (_saved(palette, "PNG", transparency=3), np.array(palette.convert("RGB")))
    for name, (content, expected) in files.items():
        shown = np.asarray(decode(content, name).convert("RGB"))
        np.testing.assert_array_equal(shown, expected if expected.ndim == 3 else np.stack([expected] * 3, -1))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = decode(_saved(Image.fromarray(picture(16, width=30)), "JPEG", exif=exif, quality=100), "turned.jpg")
    assert turned.size == (30, 16)
    frames = [Image.fromarray(picture(16, seed)) for seed in (3, 4)]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        first = decode(
            _saved(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True), f"moving.{kind}"
        )
        assert np.abs(np.asarray(first).astype(int) - picture(16, 3)).mean() < 12  # a GIF has 256 colours
    said = [record.message for record in caplog.records]
    assert len(said) == 3
    assert "rgba.png has transparency, which is dropped" in said[0]
    assert "turned.jpg has an orientation in its EXIF, which is not applied" in said[1]
    assert "moving.GIF has several frames, of which the first is taken" in said[2]


def _saved(image: Image.Image, kind: str, **options) -> bytes:
    import io

    image.save(stream := io.BytesIO(), kind, **options)
    return stream.getvalue()


def test_large_notes_and_profiles_are_no_damage():
    """For Pillow alone, more than 1 MB of them make an image unreadable."""
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt("prompt", "x" * 3_000_000, zip=True)
    for options in ({"icc_profile": bytes(2_000_000)}, {"pnginfo": notes}):
        content = _saved(Image.fromarray(picture(16)), "PNG", **options)
        np.testing.assert_array_equal(np.asarray(decode(content, "noted.png")), picture(16))
    notes.add_itxt("bomb", "x" * 70_000_000, zip=True)
    with pytest.raises(ImageError, match=r"noted\.png cannot be decoded"):
        decode(_saved(Image.fromarray(picture(16)), "PNG", pnginfo=notes), "noted.png")


WHOLE = encoded(picture(60))
BROKEN = {  # name and content of what is no image
    "cut.png": WHOLE[: len(WHOLE) // 2],
    "cut.jpg": encoded(picture(60), "JPEG")[:600],
    "chunk.png": WHOLE[:60] + b"\xff\xff\xff\xff" + WHOLE[64:],
    "sum.png": WHOLE[:20] + b"\1\2" + WHOLE[22:],
    "empty.png": b"",
    "page.jpg": b"<!DOCTYPE html><title>404</title>",
    "pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n",
    "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",  # would run a program
    "cut.gif": encoded(GREY, "GIF")[:40],
    "cut.webp": encoded(picture(60), "WEBP")[:80],
    "tag.tif": tiff(b"", (9, 9)),
    "bomb.png": empty_png(15_000, 15_000),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_named(name, made, tmp_path):
    write(tmp_path / "x/c" / name, BROKEN[name])
    refused(
        mfm("rewards", "--score", "brightness", "--images", tmp_path / "x/c", "--device", "cpu"),
        f"{tmp_path}/x/c/{name} cannot be decoded: ",
    )
    with pytest.raises(ImageError, match=f"x/c/{name} cannot be decoded: "):
        list(ImageSet(tmp_path / "x").batches())
    shard(tmp_path / "tars/set.tar", {f"c/{name}": BROKEN[name]})
    with pytest.raises(ImageError, match=f"set.tar:c/{name} cannot be decoded"):
        list(ImageSet(tmp_path / "tars").batches())


def test_broken_images_stop_or_are_left_out_of_shards(made, tmp_path):
    for name, content in BROKEN.items():
        write(tmp_path / "x/c" / name, content)
    save(tmp_path / "x/c/good.png", picture())
    write(tmp_path / "x/c/._good.png", b"\0\5\26\7")
    message = refused(prepare(made, tmp_path / "x", tmp_path / "out"), " cannot be decoded: ", "--skip-broken")
    assert str(tmp_path / "x/c/") in message
    status, said = prepare(made, tmp_path / "x", tmp_path / "skipped", "--skip-broken", "--verify")
    assert status == 0, said
    assert f"{len(BROKEN)} images could not be decoded" in said
    assert list(moments(tmp_path / "skipped")) == ["c/good_png"]


def test_workers_of_fid_name_the_file_without_their_traceback(fid, tmp_path):
    for i in range(3):
        save(tmp_path / "x" / f"{i}.png", picture(24, i))
    write(tmp_path / "x/1.png", BROKEN["cut.png"])
    refused(fid(tmp_path / "x", None, "--num-workers", 2), f"{tmp_path}/x/1.png cannot be decoded")


@pytest.mark.parametrize(("width", "height"), [(1, 60_000), (60_000, 1), (2, 30_000)])
def test_thin_images_need_no_memory(width, height, made, tmp_path):
    """Resized to 256 pixels, they would have 3.9 and 2 gigapixels."""
    write(tmp_path / "x/c/thin.png", empty_png(width, height))
    save(tmp_path / "x/c/good.png", picture(300))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(prepare(made, tmp_path / "x", tmp_path / "out", size=256), "thin.png", "too long and thin for size 256")
    status, said = prepare(made, tmp_path / "x", tmp_path / "skipped", "--skip-broken", size=256)
    assert status == 0, said
    assert list(moments(tmp_path / "skipped")) == ["c/good_png"]
    with pytest.raises(ImageError, match=r"thin\.png: too long and thin"):
        list(ImageSet(tmp_path / "x", crop=256).batches())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 << 20  # KiB; most of it the VAE's


def test_a_long_image_within_the_bound_is_cut_as_before():
    image = Image.fromarray(picture(40, width=4000))
    assert center_crop(image, 32).shape == (32, 32, 3)


def test_what_is_no_plain_file_is_left_out(made, tmp_path):
    """A FIFO, at which reading would wait for ever; a link to nothing; a folder with an image's name."""
    save(tmp_path / "x/c/good.png", picture())
    os.mkfifo(tmp_path / "x/c/pipe.png")
    (tmp_path / "x/c/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "x/c/folder.png").mkdir()
    done = []

    def work():
        done.append(prepare(made, tmp_path / "x", tmp_path / "out"))
        done.append(mfm("rewards", "--score", "brightness", "--images", tmp_path / "x/c", "--device", "cpu"))
        done.append(mfm("fid", "--samples", tmp_path / "x/c/pipe.png", "--reference", tmp_path / "x/c/pipe.png"))
        done.append(mfm("prepare-latents", "--input", tmp_path / "x/c/pipe.png", "--output", tmp_path / "none"))

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(timeout=60)
    assert len(done) == 4
    assert "2 files left out: 2 not plain files (c/gone.jpg, c/pipe.png)" in done[0][1]
    assert [status for status, _ in done[:2]] == [0, 0]
    assert "2 files left out: 2 not plain files" in done[1][1]
    refused(done[2], "pipe.png is no plain file")
    refused(done[3], "no input at", "pipe.png")


# -- storage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(decoding, "_PAUSES", (0.0, 0.0))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_an_outage_is_no_broken_image(number, made, tmp_path, monkeypatch, quick):
    """After two images the storage fails: the run stops, whatever is skipped; when it is back, nothing is missing."""
    for i in range(6):
        save(tmp_path / "x/c" / f"{i}.png", picture(40, i))
    read, calls = Path.read_bytes, [0]

    def fails(path):
        if path.suffix == ".png":
            calls[0] += 1
            if calls[0] > 2:
                raise OSError(number, os.strerror(number))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fails)
        said = prepare(made, tmp_path / "x", tmp_path / "out", "--skip-broken")
        refused(said, f"{tmp_path}/x/c/", os.strerror(number), "tried 3 times")
        with pytest.raises(ReadError, match=r"\.png cannot be read"):
            list(ImageSet(tmp_path / "x").batches())
        said = mfm("rewards", "--score", "brightness", "--images", tmp_path / "x/c", "--device", "cpu")
        refused(said, f"{tmp_path}/x/c/0.png cannot be read")
    assert prepare(made, tmp_path / "x", tmp_path / "out", "--skip-broken", "--verify")[0] == 0
    assert len(moments(tmp_path / "out")) == 6


def test_a_storage_that_comes_back_is_tried_again(tmp_path, monkeypatch, quick, caplog):
    path, read, calls = save(tmp_path / "a.png", picture()), Path.read_bytes, [0]

    def fails_once(path):
        calls[0] += 1
        if calls[0] == 1:
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", fails_once)
    np.testing.assert_array_equal(np.asarray(read_image(path)), picture())
    assert "a.png cannot be read (Input/output error): tried again" in caplog.text


def test_pillow_s_own_outage_is_none_of_a_broken_image(made, tmp_path, monkeypatch, quick):
    save(tmp_path / "x/c/a.png", picture())

    def fails(*_args, **_kwargs):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", fails)
        refused(prepare(made, tmp_path / "x", tmp_path / "out", "--skip-broken"), "a.png cannot be read")
    assert prepare(made, tmp_path / "x", tmp_path / "out", "--skip-broken")[0] == 0


def test_a_file_that_may_not_be_read_or_vanishes_stops_at_once(made, tmp_path, monkeypatch):
    save(tmp_path / "x/c/a.png", picture())
    for kind in (PermissionError(errno.EACCES, "Permission denied"), FileNotFoundError(errno.ENOENT, "No such file")):
        kind.filename = str(tmp_path / "x/c/a.png")

        def fails(_path, kind=kind):
            raise kind

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", fails)
            begin = time.monotonic()
            refused(prepare(made, tmp_path / "x", tmp_path / "out", "--skip-broken"), "a.png", kind.strerror)
            assert time.monotonic() - begin < 3
