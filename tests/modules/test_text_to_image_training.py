"""A text-to-image flow from scratch by the shipped configs on real images, with its VAE and a CLIP."""

import csv
import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from mfm_lightning.backbones import FlowNetwork, load_flow
from mfm_lightning.checkpoints import load_classifier, load_model, read_metadata
from mfm_lightning.commands.main import run
from mfm_lightning.conditions import Conditions
from mfm_lightning.data.images import CaptionedImages, EncodedImages, JoinedImages, TorchvisionImages
from mfm_lightning.samplers import integrate
from mfm_rewards import build
from tests.backbones.fast import frozen  # noqa: F401
from tests.fashion_mnist import EXTRACT, as_torchvision

OUTPUTS = Path("outputs/text_to_image/small")
SHORT = ["--trainer.max_steps=3", "--trainer.val_check_interval=3", "--data.batch_size=16", "--trainer.logger=false"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder where all jobs of `text_to_image/small` ran, each for three steps."""
    folder = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("MNIST", "FashionMNIST"):  # the same images twice, under both names
            as_torchvision(Path("data"), name)
        few = [f"--model.evaluation.init_args.{option}" for option in ("steps=2", "num_samples=2", "pictures=2")]
        run(["fit", "--config", "text_to_image/small/vae", *SHORT])
        run(["fit", "--config", "text_to_image/small/flow", *SHORT, *few])
        for name in ("clip", "classifier"):
            run(["fit", "--config", f"text_to_image/small/{name}", *SHORT])
        run(["fit", "--config", "text_to_image/small/mfm", *SHORT, *few])
        yield folder


def test_the_pipeline_that_training_leaves_is_the_averaged_network_in_diffusers(made, monkeypatch):
    monkeypatch.chdir(made)
    no_t5 = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(str(OUTPUTS / "flow/pipeline"), **no_t5)
    pipe.set_progress_bar_config(disable=True)
    flow = load_flow(OUTPUTS / "flow/pipeline", torch_dtype="float32", max_sequence_length=1)
    trained = load_model(OUTPUTS / "flow/model.safetensors")
    prompts = ["a handwritten three", "an ankle boot"]
    x0 = torch.randn(2, *flow.state_shape, generator=torch.Generator().manual_seed(0))
    options = {"height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 3.0, "max_sequence_length": 1}
    theirs = pipe(prompts, latents=x0, output_type="latent", **options).images
    given = flow.encode(prompts, guidance=3.0)
    ours = integrate(lambda t, x: flow.drift(t, x, given), x0, flow.time_grid(4))
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    # the weights in model.safetensors are the same
    network = trained.network
    given = network.embed(flow.encode(prompts, guidance=1.0))
    again = trained.drift(torch.tensor([0.3, 0.7]), x0, given)
    assert torch.allclose(again, flow.velocity(torch.tensor([0.3, 0.7]), x0, given), atol=1e-5)
    assert (OUTPUTS / "flow/pictures/step_0000003/samples.png").is_file()


def test_training_moves_the_flow_to_its_captions_and_drops_some_for_the_empty_one(made, monkeypatch):
    monkeypatch.chdir(made)
    options = {"vae": str(OUTPUTS / "vae/vae"), "max_sequence_length": 1}
    first, same, other = (FlowNetwork("text_to_image/small/architecture", seed=s, **options) for s in (0, 0, 1))
    weights = [next(network.parameters()) for network in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    null = first.null_conditions
    x = torch.randn(2, *first.state_shape)
    given = first.embed(Conditions(prompts=["a bag", ""]))
    assert torch.equal(given.text[1], null.text[0])
    assert torch.equal(given.pooled[1], null.pooled[0])
    assert not torch.allclose(given.text[0], null.text[0])
    velocity = first(torch.zeros(2), torch.zeros(2), x, torch.zeros(2), x, given)
    velocity.square().sum().backward()
    assert all(p.grad is not None for p in first.parameters())
    with pytest.raises(ValueError, match="trained on captions"):
        first.embed(Conditions(label=torch.tensor([1])))


def test_states_are_the_vaes_scaled_means_of_unit_variance(made, monkeypatch):
    monkeypatch.chdir(made)
    vae = diffusers.AutoencoderKL.from_pretrained(OUTPUTS / "vae/vae")
    data = EncodedImages(str(EXTRACT), str(OUTPUTS / "vae/vae"), size=32, batch_size=8, encode_batch=7)
    assert data.state_shape == (4, 8, 8)
    z, _ = data.splits["test"]
    pixels = data.readers["test"].kept.float() / 127.5 - 1
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
        images = (vae.decode(z / vae.config.scaling_factor).sample + 1) / 2
    assert torch.allclose(z, expected, atol=1e-5)
    assert torch.allclose(data.decode(z), images.clamp(0, 1), atol=1e-5)
    # the scale was measured on the run's test images: all their latents have unit variance
    test = TorchvisionImages("MNIST", "data", "test")
    whole = EncodedImages(test, str(OUTPUTS / "vae/vae"), size=32, val_fraction=0.3, test_fraction=0.3)
    latents = torch.cat([z for z, _ in whole.splits.values()])
    assert len(latents) == 40
    assert float(latents.std(correction=0)) == pytest.approx(1, abs=1e-3)


def test_a_clip_of_ones_own_is_the_reward_clip_score(made, monkeypatch):
    monkeypatch.chdir(made)
    folder = str(OUTPUTS / "clip/clip")
    reward, clip = build({"name": "clip_score", "weights": folder}), transformers.CLIPModel.from_pretrained(folder)
    tokens = transformers.CLIPTokenizer.from_pretrained(folder)
    images, prompts = torch.rand(2, 3, 32, 32), ["a bag", "a handwritten seven"]
    given = tokens(prompts, padding="max_length", max_length=12, return_tensors="pt")
    with torch.no_grad():
        theirs = clip(pixel_values=2 * images - 1, **given).logits_per_image.diagonal()
        ours = reward(images, prompts)
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_samples_are_counted_that_are_what_their_prompts_say(made, monkeypatch):
    monkeypatch.chdir(made)
    classifier = OUTPUTS / "classifier/model.safetensors"
    options = {"classifier": str(classifier), "steps": 2, "num_samples": 3, "pictures": 1, "prompts": "[a bag, a coat]"}
    few = [f"--model.evaluation.init_args.{k}={v}" for k, v in {**options, "labels": "[18, 14]"}.items()]
    where = ["--ckpt_path", str(OUTPUTS / "mfm/last.ckpt"), "--data.batch_size=16", "--trainer.logger=false"]
    run(["test", "--config", "text_to_image/small/mfm", *where, *few])
    rows = list(csv.DictReader((OUTPUTS / "mfm/test/prompts.csv").read_text().splitlines()))
    assert [row["prompt"] for row in rows] == 4 * ["a bag", "a coat", "all"]  # the flow, and three refinements
    assert all(row["Fréchet"] for row in rows if row["prompt"] == "all")
    # the flow's samples of bags, by hand: from the noise of the seed, by the flow alone
    flow = load_flow(OUTPUTS / "flow/pipeline", torch_dtype="float32", max_sequence_length=1)
    x0 = torch.randn(3, *flow.state_shape, generator=torch.Generator().manual_seed(0))
    given = flow.encode(["a bag"], guidance=1.0)
    with torch.no_grad():
        states = integrate(lambda t, x: flow.drift(t, x, given), x0, flow.time_grid(2))
        found = load_classifier(classifier)(flow.decoder(states)).argmax(dim=1)
    assert float(rows[0]["as prompted"]) == pytest.approx(float((found == 18).float().mean()), abs=1e-4)


def test_an_adapter_is_trained_against_the_flow_under_it(made, monkeypatch):
    monkeypatch.chdir(made)
    adapted = load_model(OUTPUTS / "mfm/model.safetensors")
    flow = load_flow(OUTPUTS / "flow/pipeline", torch_dtype="float32", max_sequence_length=1)
    given = adapted.network.embed(Conditions(prompts=["a bag", "a coat"]))
    x = torch.randn(2, *flow.state_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.2, 0.6])
    expected = flow.velocity(t, x, given)
    assert torch.allclose(adapted.network.flow.velocity(t, x, given), expected, atol=1e-6)  # the base is as it was
    trained = adapted.velocity(t, 1.0, x, t, x, given)
    assert 1e-6 < (trained - expected).abs().max() < 0.5  # three steps away from it
    header = read_metadata(OUTPUTS / "mfm/model.safetensors")
    assert header["kind"] == "meta_flow_map"
    size = (OUTPUTS / "mfm/model.safetensors").stat().st_size
    assert size < 0.5 * (OUTPUTS / "flow/model.safetensors").stat().st_size
    checkpoint = torch.load(OUTPUTS / "mfm/last.ckpt", weights_only=True)
    assert not any("transformer" in name and "lora" not in name for name in checkpoint["state_dict"])
    assert "teacher" in checkpoint["frozen"]


def test_the_flow_is_steered_by_prompt_and_what_is_not_optimised_is_measured(made, monkeypatch):
    monkeypatch.chdir(made)
    few = ["--data.images_per_prompt=1", "--model.method.init_args.grid.steps=2", "--model.base_steps=2"]
    quick = [*few, "--model.pictures=4", "--return_predictions=false"]
    run(["predict", "--config", "text_to_image/small/steer", *quick])
    folder = OUTPUTS / "steer/predict"
    lines = [json.loads(line) for line in (folder / "lines_0.jsonl").read_text().splitlines()]
    assert len(lines) == 20
    classifier = load_classifier(OUTPUTS / "classifier/model.safetensors")
    for line in (lines[3], lines[19]):  # "a handwritten three" and "an ankle boot", classes 3 and 19
        image = torch.from_numpy(np.array(Image.open(folder / line["file"]))).permute(2, 0, 1)[None] / 255
        expected = classifier(image).log_softmax(dim=1)[0, lines.index(line)]
        assert line["rewards"]["classifier"] == pytest.approx(float(expected), abs=0.05)  # of a picture in 8 bits


class Renamed(CaptionedImages):
    """With names of classes that no other source has."""

    def read_classes(self):
        labels, names = super().read_classes()
        return labels, [f"other {name}" for name in names]


def test_joined_sources_of_different_lengths_keep_each_its_images(tmp_path):
    """Three, two and one, of levels 0 to 5 in the order of the join."""
    folders = []
    for k, levels in enumerate(([0, 1, 2], [3, 4], [5])):
        folders.append(tmp_path / str(k))
        (folders[-1] / f"class {k}").mkdir(parents=True)
        for level in levels:
            Image.new("L", (4, 4), level).save(folders[-1] / f"class {k}" / f"{level}.png")
    joined = JoinedImages([str(folder) for folder in folders])
    assert joined.labels.tolist() == [0, 0, 0, 1, 1, 2]
    assert [joined.image(i).getpixel((0, 0)) for i in range(6)] == [0, 1, 2, 3, 4, 5]
    assert [Path(joined.place(i)).stem for i in range(6)] == ["0", "1", "2", "3", "4", "5"]


def test_captions_follow_classes_through_joined_sources():
    extract = str(EXTRACT)
    texts = [f"a thing of kind {k}" for k in range(10)]
    first = CaptionedImages(extract, texts, general="a thing", every=3)
    second = CaptionedImages(extract, "one more {class}")
    assert second.caption(4) == f"one more {second.class_names[second.labels[4]]}"
    assert [first.caption(i) == "a thing" for i in range(4)] == [True, False, False, True]
    assert first.caption(1) == texts[first.labels[1]]
    third = Renamed(extract, "one more {class}")
    joined, n = JoinedImages([first, third]), len(first.labels)
    for i, (source, row, offset) in {
        1: (first, 1, 0),
        n - 1: (first, n - 1, 0),
        n: (third, 0, 10),
        n + 4: (third, 4, 10),
    }.items():
        assert joined.labels[i] == source.labels[row] + offset
        assert joined.caption(i) == source.caption(row)
        assert np.array_equal(joined.image(i), source.image(row))
    with pytest.raises(ValueError, match="two sources have a class"):
        _ = JoinedImages([first, second]).class_names
    with pytest.raises(ValueError, match="some sources have captions and some have none"):
        JoinedImages([first, extract])
    with pytest.raises(ValueError, match="3 captions for 10 classes"):
        _ = CaptionedImages(extract, ["a", "b", "c"]).labels
    with pytest.raises(ValueError, match=r"expected \{class\} in it"):
        _ = CaptionedImages(extract, "a photo").labels
