"""Captioned images to latents and embeddings of a text-to-image flow, against diffusers' own pipelines."""

import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset.compat
import webdataset.writer
from PIL import Image
from safetensors.torch import load

from mfm_lightning.backbones import SD3Flow
from mfm_lightning.commands.main import run
from mfm_lightning.data import LatentShards
from mfm_lightning.data.images import CaptionedFolder
from mfm_lightning.data.latents.index import LatentIndex, LatentIndexError
from mfm_lightning.data.latents.verify import verify
from mfm_lightning.utils.decoding import center_crop
from tests.backbones import encoders, tiny
from tests.backbones.fast import frozen  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = {"sd3": encoders.of_sd3, "flux": encoders.of_flux, "sana": encoders.of_gemma, "lumina2": encoders.of_gemma}
SIZES = {"sd3": 16, "flux": 16, "sana": 64, "lumina2": 32}
TOKENS = 6
CAPTIONS = ["a red cat", "the blue dog", "a red cat", "three dog on the mat a red cat on the mat", "", "a dog"]


def pixels(i, side=70):
    return np.random.default_rng(i).integers(0, 256, (side, side + i, 3), dtype=np.uint8)


def pictures(folder: Path, captions=CAPTIONS) -> Path:
    folder.mkdir(parents=True)
    for i, caption in enumerate(captions):
        Image.fromarray(pixels(i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f" {caption}\n")
    return folder


def command(folder: Path, family: str, *more: str, output: str = "shards") -> list[str]:
    sizes = ["--shard-size", "2", "--batch-size", "2", "--threads", "1", "--device", "cpu"]
    sizes += ["--image-size", str(SIZES[family]), "--max-sequence-length", str(TOKENS)]
    given = ["--input", str(folder / "pictures"), "--flow", str(folder / family), "--captions", "auto", *sizes, *more]
    return ["prepare-latents", *given, "--output", str(folder / f"{output}_{family}")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Tiny pipelines on disk, six captioned pictures, and their shards for each of the pipelines."""
    folder = tmp_path_factory.mktemp("captioned")
    pictures(folder / "pictures")
    for family, parts in FAMILIES.items():
        getattr(tiny, family)(**parts(folder / "words")).save_pretrained(folder / family)
    for family in FAMILIES:
        run(command(folder, family, "--verify"))
    return folder


def diffusers_pipeline(made, family) -> Any:
    kind = {
        "sd3": "StableDiffusion3Pipeline",
        "flux": "FluxPipeline",
        "sana": "SanaPipeline",
        "lumina2": "Lumina2Pipeline",
    }[family]
    return getattr(tiny.diffusers, kind).from_pretrained(made / family)


def by_diffusers(pipe, family, caption):
    """The embeddings of its own `encode_prompt`."""
    tokens: dict[str, Any] = {"max_sequence_length": TOKENS, "device": "cpu"}
    if family == "sd3":
        text, _, pooled, _ = pipe.encode_prompt(caption, None, None, do_classifier_free_guidance=False, **tokens)
        return {"text": text, "pooled": pooled}
    if family == "flux":
        text, pooled, _ = pipe.encode_prompt(caption, None, **tokens)
        return {"text": text, "pooled": pooled}
    if family == "lumina2":
        text, mask, _, _ = pipe.encode_prompt(caption, do_classifier_free_guidance=False, **tokens)
        return {"text": text, "mask": mask}
    instruction = tiny.diffusers.SanaPipeline.__call__.__wrapped__.__defaults__[-1]
    text, mask, _, _ = pipe.encode_prompt(
        caption, do_classifier_free_guidance=False, complex_human_instruction=instruction, **tokens
    )
    return {"text": text, "mask": mask}


def members(folder):
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    return list(webdataset.compat.WebDataset(urls, shardshuffle=False))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_shards_hold_what_the_pipelines_own_parts_give(made, family):
    pipe, folder = diffusers_pipeline(made, family), made / f"shards_{family}"
    index = LatentIndex.load(folder)
    scale, shift = {"sana": (0.41, 0.0)}.get(family, (0.7, 0.11))  # of tiny's VAEs
    assert (index.scale, index.shift, index.samples) == (scale, shift, 6)
    found = members(folder)
    assert sorted(int(s["__key__"]) for s in found) == list(range(6))
    for s in found:
        i = int(s["__key__"])
        x = torch.from_numpy(center_crop(Image.fromarray(pixels(i)), SIZES[family])).permute(2, 0, 1)[None] / 127.5 - 1
        encoded, moments = pipe.vae.encode(x), np.load(io.BytesIO(s["npy"]))
        mean = encoded.latent if family == "sana" else encoded.latent_dist.mean
        np.testing.assert_allclose(moments[0, 0], mean[0].numpy(), atol=2e-3)
        assert (family == "sana") == (not moments[:, 1].any())
        assert s["txt"].decode().strip() == CAPTIONS[i]
        assert int(s["cls"]) == 0
        expected, kept = by_diffusers(pipe, family, CAPTIONS[i]), load(s["safetensors"])
        assert kept.keys() == expected.keys()
        for name, value in expected.items():
            typed = value[0].to(torch.bfloat16) if value.is_floating_point() else value[0]
            assert kept[name].dtype == typed.dtype
            torch.testing.assert_close(kept[name], typed, atol=0, rtol=0.01)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_batches_are_states_of_the_flow_with_its_conditions(made, family):
    """The same from worker processes, and from a resumed reader."""
    pipe = diffusers_pipeline(made, family)
    data = LatentShards(str(made / f"shards_{family}"), 2, 0, 4, flip=False, val_shards=0)
    scale, shift = {"sana": (0.41, 0.0)}.get(family, (0.7, 0.11))
    images = {CAPTIONS[i]: i for i in (1, 3, 4, 5)}  # of the others two are alike
    batches: list[Any] = list(data.loader(length=3))
    seen = [caption for _, given in batches for caption in given["prompts"]]
    assert sorted(seen) == sorted(CAPTIONS)
    by_workers: list[Any] = list(data.loader(length=3, num_workers=1))
    for (x1, given), (x2, others) in zip(batches, by_workers, strict=True):
        assert torch.equal(x1, x2)
        assert given["prompts"] == others["prompts"]
        assert all(torch.equal(given[name], others[name]) for name in given if name != "prompts")
        for row, caption in enumerate(given["prompts"]):
            for name, value in by_diffusers(pipe, family, caption).items():
                torch.testing.assert_close(given[name][row].float(), value[0].float(), atol=0, rtol=0.01)
            if family == "sana" and caption in images:  # its encoder draws nothing
                x = torch.from_numpy(center_crop(Image.fromarray(pixels(images[caption])), SIZES[family]))
                z = pipe.vae.encode(x.permute(2, 0, 1)[None] / 127.5 - 1).latent
                torch.testing.assert_close(x1[row], (z[0] - shift) * scale, atol=2e-3, rtol=2e-3)
    again: Any = next(iter(data.loader(start=2, length=3)))
    assert torch.equal(again[0], batches[2][0])
    assert again[1]["prompts"] == batches[2][1]["prompts"]
    embedded = data.embedded
    assert embedded is not None
    for name, value in by_diffusers(pipe, family, "").items():
        torch.testing.assert_close(embedded.null[name].float(), value.float(), atol=0, rtol=0.01)


@torch.no_grad()
def test_states_have_the_mean_and_spread_of_the_shifted_posterior(made):
    """Of SD3's VAE: many draws of one image by the written scale and shift."""
    pipe, data = diffusers_pipeline(made, "sd3"), LatentShards(str(made / "shards_sd3"), 6, 0, flip=False, val_shards=0)
    batches: Any = data.loader(length=200)
    draws = [x1[given["prompts"].index("a dog")] for x1, given in batches]
    x = torch.from_numpy(center_crop(Image.fromarray(pixels(5)), 16)).permute(2, 0, 1)[None] / 127.5 - 1
    posterior = pipe.vae.encode(x).latent_dist
    mean, std = (posterior.mean[0] - 0.11) * 0.7, 0.7 * posterior.std[0]
    z = (torch.stack(draws).mean(dim=0) - mean) / (std / 200**0.5)
    assert z.abs().max() < 5
    assert abs(float(z.square().mean()) - 1) < 0.5
    torch.testing.assert_close(torch.stack(draws).std(dim=0), std, atol=0, rtol=0.3)


def test_text_encoders_are_loaded_once_and_what_is_kept_is_said(made, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    embedded, embed = [], SD3Flow._embed
    monkeypatch.setattr(
        SD3Flow, "_embed", lambda self, pipe, text, neg: (embedded.append(text), embed(self, pipe, text, neg))[1]
    )
    run(command(made, "sd3", output="again"))
    assert sum("text encoders of" in message for message in caplog.messages) == 1
    assert sorted(embedded) == sorted(set(CAPTIONS))
    assert f"captions: {77 + TOKENS} tokens, kept in bf16" in caplog.text
    assert f"1 of 6 captions have more than {TOKENS} tokens" in caplog.text
    files = {path.name: path.read_bytes() for path in (made / "shards_sd3").glob("*.tar")}
    assert files == {path.name: path.read_bytes() for path in (made / "again_sd3").glob("*.tar")}
    # lost shards are made again, and nothing else
    (made / "again_sd3/latents-000001.tar").unlink()
    run(command(made, "sd3", "--verify", output="again"))
    assert files == {path.name: path.read_bytes() for path in (made / "again_sd3").glob("*.tar")}
    for rank in (1, 0):  # two of torchrun's processes, one after the other
        for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, str(value))
        run(command(made, "sd3", output="ranks"))
        assert (made / "ranks_sd3/index.json").exists() == (rank == 0)
    assert files == {path.name: path.read_bytes() for path in (made / "ranks_sd3").glob("*.tar")}
    written = json.loads((made / "again_sd3/index.json").read_text())
    assert written["flow"]["name"] == str(made / "sd3")
    assert written["flow"]["max_sequence_length"] == TOKENS
    assert written["made_with"]["image_size"] == 16


def test_damaged_embeddings_are_found(made, tmp_path):
    folder = tmp_path / "shards"
    shutil.copytree(made / "shards_flux", folder)
    path = folder / "latents-000000.tar"
    layout = LatentIndex.load(folder).layout
    content = bytearray(path.read_bytes())
    content[layout.embedding_at + 9] ^= 255  # of the header of the first sample's embedding
    path.write_bytes(content)
    with pytest.raises(LatentIndexError, match="embedding is of another form"):
        verify(str(folder))
    data = LatentShards(str(folder), 2, 0, val_shards=0)
    with pytest.raises(ValueError, match="its caption's embedding is of another form than the index's"):
        list(data.loader(length=3))
    skipping = LatentShards(str(folder), 2, 0, val_shards=0, corrupt="skip")
    assert len(list(skipping.loader(length=3))) == 3
    assert skipping.skipped == 1


def test_other_flows_and_settings_do_not_meet_in_one_folder(made):
    with pytest.raises(ValueError, match=r"other settings \(.*flow's max_sequence_length was 6, is 7"):
        run([*command(made, "sd3")[:-2], "--max-sequence-length", "7", "--output", str(made / "shards_sd3")])
    with pytest.raises(ValueError, match=r"other settings \(embeddings was bf16, is fp32\)"):
        run(command(made, "sd3", "--embeddings", "fp32"))
    with pytest.raises(ValueError, match="give --flow, a text-to-image flow"):
        run(["prepare-latents", "--input", str(made / "pictures"), "--captions", "auto", "--output", str(made / "x")])
    with pytest.raises(ValueError, match=r"height and width must be multiples of 4"):
        run(command(made, "sd3", "--image-size", "18", output="x"))
    with pytest.raises(FileNotFoundError, match="no captions beside the images"):
        run(command(made, "sd3", "--captions", "caption", output="x"))


def test_captions_from_shards_and_by_class(made, tmp_path):
    """A text or a JSON's key of each sample; without labels; and one text for a class."""
    png = {i: (made / f"pictures/{i}.png").read_bytes() for i in range(2)}
    files = [{"png": png[i], "txt": f"a red cat{i * ' on'}".encode(), "json": b'{"words": "a dog"}'} for i in range(2)]
    with webdataset.writer.TarWriter(str(tmp_path / "in.tar")) as tar:
        for i, file in enumerate(files):
            tar.write({"__key__": f"{i:04d}", **file})
    rest = command(made, "flux")[3:-2]
    shard = ["prepare-latents", "--input", str(tmp_path / "in.tar"), *rest]
    for captions, expected in (("auto", ["a red cat", "a red cat on"]), ("json:words", ["a dog", "a dog"])):
        out = tmp_path / captions.partition(":")[0]
        run([*shard, "--captions", captions, "--output", str(out)])
        assert [s["txt"].decode().strip() for s in members(out)] == expected
    with pytest.raises(ValueError, match=r"in\.tar:0000 has json, png, txt, expected cap: .*\(--captions\)"):
        run([*shard, "--captions", "cap", "--output", str(tmp_path / "x")])
    for name in ("cat", "dog"):
        pictures(tmp_path / "classes" / name, ["x"])
    out = tmp_path / "by_class"
    run(["prepare-latents", "--input", f"{tmp_path}/classes", *rest, "--captions", "a {class}", "--output", str(out)])
    assert sorted((s["cls"], s["txt"].strip()) for s in members(out)) == [(b"0", b"a cat"), (b"1", b"a dog")]


def test_lists_of_captions(tmp_path, caplog):
    root = pictures(tmp_path / "images")
    for path in root.glob("*.txt"):
        path.rename(path.with_suffix(".caption"))
    assert [CaptionedFolder(str(root)).caption(i) for i in range(6)] == CAPTIONS
    rows = [{"file_name": f"{i}.png", "text": f"number {i}", "Long": f"longer {i}"} for i in (4, 2, 9)]
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = CaptionedFolder(str(root))
    assert {Path(found.place(i)).name: found.caption(i) for i in (0, 1)} == {"2.png": "number 2", "4.png": "number 4"}
    assert "4 images without a caption are left out: 0.png, 1.png, 3.png, 5.png" in caplog.text
    assert "1 captions without an image are left out: 9.png" in caplog.text
    assert CaptionedFolder(str(root), "long").caption(0) == "longer 2"
    assert CaptionedFolder(str(root), "caption").caption(0) == CAPTIONS[0]  # beside it wins where it is asked for
    both = [{"image_id": 7, "caption": text} for text in ("x", "y")]
    coco = {"images": [{"id": 7, "file_name": "3.png"}], "annotations": both}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    assert CaptionedFolder(str(root), str(tmp_path / "coco.json")).caption(0) == "x"
    (root / "metadata.jsonl").write_text('{"file_name": "1.png", "title": "a"}\n')
    with pytest.raises(ValueError, match=r"metadata\.jsonl, row 1: no column text or caption or prompt, only file_na"):
        _ = CaptionedFolder(str(root)).labels
    with pytest.raises(FileNotFoundError, match=r"no list of captions at .*none\.jsonl"):
        _ = CaptionedFolder(str(root), str(root / "none.jsonl")).labels
    (root / "metadata.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"captions 'titles' is none of a file, .* has no list"):
        _ = CaptionedFolder(str(root), "titles").labels


@pytest.mark.parametrize("kind", ["csv", "jsonl", "coco"])
def test_the_first_of_several_captions_is_taken_and_said(tmp_path, caplog, kind):
    root = pictures(tmp_path / "images", ["", ""])
    rows = [("1.png", "first"), ("0.png", "only"), ("1.png", "second"), ("1.png", "third")]
    if kind == "csv":
        (root / "captions.csv").write_text("image,caption\n" + "".join(f"{name},{text}\n" for name, text in rows))
    elif kind == "jsonl":
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
        (root / "metadata.jsonl").write_text("\n".join(lines))
    else:
        texts = [{"image_id": int(name[0]), "caption": text} for name, text in rows]
        coco = {"images": [{"id": i, "file_name": f"{i}.png"} for i in (0, 1)], "annotations": texts}
        (tmp_path / "coco.json").write_text(json.dumps(coco))
    found = CaptionedFolder(str(root), str(tmp_path / "coco.json") if kind == "coco" else None)
    assert [found.caption(i) for i in (0, 1)] == ["only", "first"]
    assert f"{root}: 1 images have several captions, of which the first is taken: 1.png" in caplog.messages
    assert f"{root}: 2 files left out: 2 .txt (0.txt, 1.txt)" in "\n".join(caplog.messages)  # the list is read


def test_what_is_left_out_of_captioned_pictures_and_empty_captions_are_said(tmp_path, caplog):
    root = pictures(tmp_path / "images", ["a", "", "b"])
    for name in ("2.caption", "x/lone.txt", "c.heic", "d.tar", ".hidden"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"-")
    found = CaptionedFolder(str(root))
    assert [found.caption(i) for i in range(3)] == ["a", "", "b"]
    left_out = "1 .tar, 1 .caption, 1 .heic, 1 captions without an image (d.tar, 2.caption, c.heic, ...)"
    assert caplog.messages == [
        f"{root}: 4 files left out: {left_out}",
        f"{root}: 1 captions are empty: they become the empty prompt: 1.png",
    ]


def test_which_list_and_column_captions_are_from(tmp_path, caplog):
    root = pictures(tmp_path / "images", ["beside"])
    row = {"file_name": "0.png", "image": "z.png", "text": "of text", "caption": "of caption"}
    (root / "metadata.jsonl").write_text(json.dumps(row))
    (root / "captions.csv").write_text("file_name,caption\n0.png,of the other list\n")
    assert CaptionedFolder(str(root)).caption(0) == "of text"
    assert f"{root}: captions are from metadata.jsonl, not captions.csv: give the path of another" in caplog.messages
    assert f"{root}/metadata.jsonl: captions are those of column text, not caption" in caplog.messages
    assert f"{root}/metadata.jsonl: names of files are those of column file_name, not image" in caplog.messages
    for given, expected in (
        ("caption", "of caption"),
        ("txt", "beside"),
        (f"{root}/metadata.jsonl:caption", "of caption"),
        (f"{root}/captions.csv", "of the other list"),
    ):
        assert CaptionedFolder(str(root), given).caption(0) == expected
    (root / "0.txt").unlink()
    with pytest.raises(ValueError, match=r"no column txt, only file_name, .*; and no \.txt is beside an image"):
        CaptionedFolder(str(root), "txt").caption(0)
    with pytest.raises(FileNotFoundError, match=r"no list of captions at .*none\.csv"):
        CaptionedFolder(str(root), f"{root}/none.csv:caption").caption(0)


@pytest.mark.parametrize(
    ("images", "annotations", "message"),
    [
        ([{"id": 0, "file_name": "0.png"}], [{"image_id": 0, "caption": None}], r"the caption of 0\.png is no text"),
        ([{"id": 0}], [], "image 0 has no file_name, only id"),
        (
            [{"id": 0, "file_name": "0.png"}],
            [{"image_id": 0, "text": "a"}],
            "annotation 0 has no caption, only image_id, text",
        ),
        (
            [{"id": 0, "file_name": "0.png"}],
            [{"image_id": 7, "caption": "a"}],
            "is of image 7, which is not among the images",
        ),
        (["0.png"], [], "image 0 is '0.png', no object"),
    ],
)
def test_what_is_wrong_in_a_list_of_coco_is_said(images, annotations, message, tmp_path):
    root = pictures(tmp_path / "images", ["beside"])
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    with pytest.raises(ValueError, match=rf"coco\.json is no list of captions as COCO's: .*{message}"):
        CaptionedFolder(str(root), str(tmp_path / "coco.json")).caption(0)


def test_a_data_set_of_hugging_face(made, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [str(made / f"pictures/{i}.png") for i in range(3)], "caption": ["a cat", "a dog", "a mat"]}
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    (tmp_path / "set").mkdir()
    data.to_parquet(tmp_path / "set/train.parquet")
    rest = command(made, "flux")[3:-2]
    run(["prepare-latents", "--input", f"{tmp_path}/set", *rest, "--output", f"{tmp_path}/out", "--verify"])
    assert {s["__key__"]: s["txt"].strip() for s in members(tmp_path / "out")} == {
        "00000000": b"a cat", "00000001": b"a dog", "00000002": b"a mat"
    }  # fmt: skip


def test_a_buffer_that_takes_much_memory_is_said(made, caplog, monkeypatch):
    LatentShards(str(made / "shards_sd3"), 1, 4, 2048).setup()
    assert "shuffle_buffer" not in caplog.text
    monkeypatch.setattr("mfm_lightning.data.latents.datamodule.MUCH", 1e6)
    data = LatentShards(str(made / "shards_sd3"), 1, 4, 2048)
    data.setup()
    stride = data.index.layout.stride
    assert (
        f"2048 samples of {stride / 1e6:.2g} MB in each of 4 workers take {8192 * stride / 1e9:.2g} GB" in caplog.text
    )
