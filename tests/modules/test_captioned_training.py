"""A flow's adapter trained on shards of latents and embeddings: no text encoder is needed, and others are refused."""

import csv
import json
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mfm_lightning.backbones import FlowAdapter, TextToImageFlow
from mfm_lightning.backbones.embeddings import EmbeddingCache
from mfm_lightning.backbones.fingerprint import fingerprint_of
from mfm_lightning.commands.main import main, run
from mfm_lightning.conditions import Conditions
from mfm_lightning.data import ImageDataModule, LatentShards
from mfm_lightning.data.images import CaptionedFolder
from mfm_lightning.modules import MFMPretraining
from mfm_lightning.utils.decoding import center_crop
from tests.backbones import encoders, tiny
from tests.backbones.fast import frozen  # noqa: F401
from tests.fashion_mnist import EXTRACT

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = {"sd3": encoders.of_sd3, "flux": encoders.of_flux, "sana": encoders.of_gemma}
SIZES = {"sd3": 16, "flux": 16, "sana": 64}
TOKENS = 6
CAPTIONS = ["a red cat", "the blue dog", "a dog on the mat", "three cat"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Four captioned pictures and a tiny pipeline of each family, and shards."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "pictures").mkdir()
    random = np.random.default_rng(0)
    for i, caption in enumerate(CAPTIONS):
        pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"pictures/{i}.png")
        (folder / f"pictures/{i}.txt").write_text(caption)
    for family, parts in FAMILIES.items():
        getattr(tiny, family)(**parts(folder / "words")).save_pretrained(folder / family)
        run(prepared(folder, family))
    return folder


def prepared(folder: Path, family: str) -> list[str]:
    """The command of a config's head comment, at tiny sizes."""
    text = (Path(__file__).parents[2] / f"configs/text_to_image/{family}/mfm.yaml").read_text()
    command = " ".join(line.strip("# \\\n") for line in text.split("\n") if line.startswith("#")).split("mfm ")[1]
    words = command.split("   ")[0].split()
    assert words[0] == "prepare-latents"
    change = {"--input": folder / "pictures", "--output": folder / f"latents_{family}", "--flow": folder / family}
    change |= {"--image-size": SIZES[family]}
    for name, value in change.items():
        words[words.index(name) + 1] = str(value)
    words = [word for word in words if word not in ("--allow-download", "--verify")]
    precision = words.index("--precision")
    del words[precision : precision + 2]
    few = ["--device", "cpu", "--batch-size", "2", "--shard-size", "2", "--threads", "1", "--num-workers", "1"]
    return [*words, *few, "--embeddings", "fp32", "--max-sequence-length", str(TOKENS)]


def settings(folder: Path, family: str) -> list[str]:
    """That make a config's job small."""
    network, data = "--model.init_args.network.init_args", "--data.init_args"
    return [
        "--config", f"text_to_image/{family}/mfm", f"{network}.name={folder / family}", f"{network}.rank=2",
        f"{network}.image_size={SIZES[family]}", f"{network}.max_sequence_length={TOKENS}",
        f"{network}.torch_dtype=float32", f"{data}.folder={folder / f'latents_{family}'}", f"{data}.batch_size=2",
        f"{data}.num_workers=0", f"{data}.val_shards=1", "--trainer.max_steps=2", "--trainer.val_check_interval=2",
        "--trainer.precision=32-true", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1",
        "--model.init_args.optimization.warmup_steps=0", "--trainer.accumulate_grad_batches=1",
    ]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configs_train_without_text_encoders(made, family, tmp_path, monkeypatch):
    """From the command in the config's head to two steps; the loss is that of the same images and captions encoded by
    diffusers' pipeline."""
    monkeypatch.chdir(tmp_path)

    def refused(self):
        raise AssertionError("text encoders were loaded")

    seen, step = [], MFMPretraining.training_step

    def recorded(self, batch, batch_idx):
        state = torch.get_rng_state()
        loss = step(self, batch, batch_idx)
        seen.append((batch, state, loss.detach()))
        return loss

    with monkeypatch.context() as patched:
        patched.setattr(TextToImageFlow, "whole_pipeline", refused)
        patched.setattr(MFMPretraining, "training_step", recorded)
        trained = run(["fit", *settings(made, family)])
    assert trained.trainer.global_step == 2
    assert "val/loss" in (tmp_path / f"outputs/text_to_image/{family}/mfm/logs/csv/metrics.csv").read_text()
    (x1, given), state, loss = seen[0]
    pipe, prompts = pipeline(made, family), given["prompts"]
    expected = states_by_pipeline(pipe, family, made, prompts)
    torch.testing.assert_close(x1, expected, atol=5e-3, rtol=5e-3)
    # the network as it was at first, with embeddings by the pipeline's text encoders
    network = FlowAdapter(**trained.model.model.network.config)
    network.flow.given["", False] = by_pipeline(pipe, family, [""])
    module = MFMPretraining(network, trained.model.objective)

    def loss_of(texts):
        torch.set_rng_state(state)
        conditions = Conditions(**by_pipeline(pipe, family, texts))
        return module.losses(expected, conditions, training=True)["loss"].detach()

    torch.testing.assert_close(loss, loss_of(prompts), rtol=1e-3, atol=0)
    assert abs(loss_of(["three mat"] * 2) / loss - 1) > 5e-3  # which other captions do not have


def pipeline(made, family) -> Any:
    kind = {"sd3": "StableDiffusion3Pipeline", "flux": "FluxPipeline", "sana": "SanaPipeline"}[family]
    return getattr(tiny.diffusers, kind).from_pretrained(made / family)


@torch.no_grad()
def states_by_pipeline(pipe, family, made, prompts):
    """The states of the first batch: drawn with its noise by the pipeline's VAE, and scaled as tiny's are."""
    scale, shift = {"sana": (0.41, 0.0)}.get(family, (0.7, 0.11))
    size, states = SIZES[family], []
    for prompt in prompts:
        image = center_crop(Image.open(made / f"pictures/{CAPTIONS.index(prompt)}.png"), size)
        found = pipe.vae.encode(torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1)
        mean, std = (found.latent, 0.0) if family == "sana" else (found.latent_dist.mean, found.latent_dist.std)
        states.append((mean, std))
    seed = int(np.random.SeedSequence([0, 1, 0, 0, 0]).generate_state(2)[0])  # of seed 0, epoch 0, rank 0, batch 0
    shape = (len(prompts), states[0][0].numel())
    noise = torch.empty(shape).normal_(generator=torch.Generator().manual_seed(seed))
    drawn = [mean + std * row.reshape(mean.shape) for (mean, std), row in zip(states, noise, strict=True)]
    return (torch.cat(drawn) - shift) * scale


def by_pipeline(pipe, family, prompts) -> dict[str, Any]:
    tokens: dict[str, Any] = {"max_sequence_length": TOKENS, "device": "cpu"}
    if family == "sd3":
        text, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False, **tokens)
        return {"text": text, "pooled": pooled}
    if family == "flux":
        text, pooled, _ = pipe.encode_prompt(prompts, None, **tokens)
        return {"text": text, "pooled": pooled}
    instruction = tiny.diffusers.SanaPipeline.__call__.__wrapped__.__defaults__[-1]
    text, mask, _, _ = pipe.encode_prompt(
        prompts, do_classifier_free_guidance=False, complex_human_instruction=instruction, **tokens
    )
    return {"text": text, "mask": mask}


def test_data_of_another_flow_are_refused_in_a_line(made, tmp_path, monkeypatch):
    """Another VAE, other text encoders, another number of tokens; another transformer is none of these."""
    monkeypatch.chdir(tmp_path)

    def message(change, *more):
        other = tmp_path / f"other{len(list(tmp_path.iterdir()))}"
        shutil.copytree(made / "sd3", other)
        change(other)
        arguments = ["fit", *settings(made, "sd3"), f"--model.init_args.network.init_args.name={other}", *more]
        monkeypatch.setattr("sys.argv", ["mfm"])
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--overwrite"])
        return str(stopped.value)

    def other_weights(part, file):
        def change(folder):
            tensors = load_file(folder / part / file)
            save_file({name: value + 1e-3 for name, value in tensors.items()}, folder / part / file)

        return change

    where = rf"{made}/latents_sd3 was made for .*sd3, with other "
    for change, what in (
        (other_weights("vae", "diffusion_pytorch_model.safetensors"), "VAE"),
        (other_weights("text_encoder_3", "model.safetensors"), "text encoders"),
    ):
        assert re.search(rf"{where}{what} \(.*run mfm prepare-latents", message(change))
    tokens = "--model.init_args.network.init_args.max_sequence_length=7"
    assert re.search(rf"{where}tokens \(6\) than the network's \(7\)", message(lambda _: None, tokens))
    other = tmp_path / "finetuned"
    shutil.copytree(made / "sd3", other)
    other_weights("transformer", "diffusion_pytorch_model.safetensors")(other)
    run(["fit", *settings(made, "sd3"), f"--model.init_args.network.init_args.name={other}", "--overwrite"])


def test_fingerprints_are_those_of_contents(made, tmp_path):
    folder = tmp_path / "vae"
    shutil.copytree(made / "flux/vae", folder)
    before = fingerprint_of([made / "flux/vae"])
    assert fingerprint_of([folder]) == before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_diffusers_version": "0.1", "_name_or_path": "there"}))
    assert fingerprint_of([folder]) == before
    (folder / "config.json").write_text(json.dumps({**config, "shift_factor": 0.12}))
    assert fingerprint_of([folder]) != before
    # of a large file a part is read: a change of all of it is seen
    large = tmp_path / "large"
    large.mkdir()
    content = np.random.default_rng(0).integers(0, 256, 6 << 20, dtype=np.uint8)
    (large / "model.safetensors").write_bytes(content.tobytes())
    one = fingerprint_of([large])
    (large / "model.fp16.safetensors").write_bytes(b"x")
    assert fingerprint_of([large]) == one
    assert fingerprint_of([large], "fp16") != one
    (large / "model.safetensors").write_bytes((content ^ 1).tobytes())
    assert fingerprint_of([large]) != one


def test_text_encoders_are_loaded_once_for_captions_without_embeddings(made, caplog, monkeypatch):
    """Of few captions before training; of others they stay from the second new batch on."""
    caplog.set_level(logging.INFO)
    loads = lambda: sum("text encoders of" in text for text in caplog.messages)  # noqa: E731
    options: dict[str, Any] = {"rank": 2, "image_size": 16, "max_sequence_length": TOKENS}
    network = FlowAdapter(str(made / "flux"), **options)
    network.meet(SimpleNamespace(captions=["a cat", "a dog"]))
    assert loads() == 1
    for prompts in (["a cat", "a dog"], ["a dog", "a dog"]):
        found = network.embed(Conditions(prompts=prompts))
        expected = by_pipeline(pipeline(made, "flux"), "flux", prompts)
        torch.testing.assert_close(found.text, expected["text"])
        torch.testing.assert_close(found.pooled, expected["pooled"])
    _ = network.null_conditions
    assert loads() == 1
    for k, prompts in enumerate((["a mat"], ["red cat"], ["on mat"], ["the cat on"], ["on"])):
        found = network.embed(Conditions(prompts=prompts))
        torch.testing.assert_close(found.text, by_pipeline(pipeline(made, "flux"), "flux", prompts)["text"])
        assert loads() == min(k + 2, 3)
    assert "text encoders stay in memory" in caplog.text
    # what is given is taken as it is
    text = torch.randn(1, 3, tiny.TEXT)
    assert network.embed(Conditions(prompts=["new"], text=text)).text is text
    assert loads() == 3


def test_embeddings_in_memory_are_bounded():
    cache = EmbeddingCache(None, megabytes=1e-3)
    rows = [{"text": torch.full((1, 10, 10), float(i))} for i in range(4)]  # of 400 bytes
    for i, row in enumerate(rows[:3]):
        cache.keep({"prompt": i}, row)
        assert cache.find({"prompt": 1}) is (rows[1] if i else None)
    assert [cache.has({"prompt": i}) for i in range(3)] == [False, True, True]
    cache.find({"prompt": 1})
    cache.keep({"prompt": 3}, rows[3])
    assert [cache.has({"prompt": i}) for i in range(4)] == [False, True, False, True]


def test_images_say_their_captions_where_they_are_few(made):
    data = ImageDataModule(CaptionedFolder(str(made / "pictures")), size=16, val_fraction=0.25, test_fraction=0.25)
    assert sorted(data.captions) == sorted(CAPTIONS)
    assert ImageDataModule(str(EXTRACT), size=16).captions == []


def test_a_resumed_training_sees_the_batches_that_it_would_have_seen(made):
    data = LatentShards(str(made / "latents_sd3"), 1, 1, shuffle_buffer=2, val_shards=0)
    whole: list[Any] = list(data.loader(length=9))
    rest: list[Any] = list(data.loader(start=5, length=9))
    for (x1, given), (x2, other) in zip(whole[5:], rest, strict=True):
        assert torch.equal(x1, x2)
        assert given["prompts"] == other["prompts"]
        assert torch.equal(given["text"], other["text"])
    ranks: list[Any] = [next(iter(data.loader(rank=rank, world_size=2))) for rank in (0, 1)]
    assert ranks[0][1]["prompts"] != ranks[1][1]["prompts"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_configs_fine_tune_to_a_lora_in_bfloat16(made, family, tmp_path, monkeypatch):
    """From shards to a Meta Flow Map to a LoRA, by the shipped configs, the base in bfloat16 as they say; its draws are
    paid about as those of a base in float32, and diffusers loads the LoRA."""
    monkeypatch.chdir(tmp_path)
    run(["fit", *settings(made, family), "--model.init_args.network.init_args.torch_dtype=bfloat16"])
    Path("prompts.txt").write_text("a red cat\nthe dog\n")
    flow, data = "--model.init_args.flow.init_args", "--data.init_args"
    options = [
        "--config", f"text_to_image/{family}/finetune", f"{flow}.name={made / family}", "--trainer.max_steps=2",
        f"{flow}.image_size={SIZES[family]}", f"{flow}.max_sequence_length={TOKENS}", "--model.init_args.rank=2",
        "--model.init_args.reward=brightness", f"{data}.data.init_args.folder={made / f'latents_{family}'}",
        f"{data}.data.init_args.num_workers=0", f"{data}.data.init_args.batch_size=2", f"{data}.buffer_size=4",
        f"{data}.ode_steps=2", "--trainer.accelerator=cpu", "--trainer.val_check_interval=2",
        "--trainer.accumulate_grad_batches=1", "--trainer.log_every_n_steps=1",
        "--model.init_args.optimization.warmup_steps=0",
        "--model.init_args.evaluation.init_args.steps=2", "--model.init_args.evaluation.init_args.batch_size=2",
    ]  # fmt: skip
    rewards = {}
    for dtype in ("bfloat16", "float32"):
        where = f"--trainer.default_root_dir={dtype}"
        trained = run(["fit", *options, f"{flow}.torch_dtype={dtype}", where])
        assert {p.dtype for p in trained.model.policy.parameters()} == {torch.float32}
        with open(f"{dtype}/logs/csv/metrics.csv") as file:
            rewards[dtype] = [float(row["train/reward"]) for row in csv.DictReader(file) if row["train/reward"]]
    assert len(rewards["bfloat16"]) == 2
    assert rewards["bfloat16"] == pytest.approx(rewards["float32"], rel=0.05)  # of draws of the same noise
    assert trained.model.flow.given  # the shards' null embedding was met
    pipe = pipeline(made, family)
    pipe.load_lora_weights("bfloat16/lora")
    assert any("lora_B" in name and p.abs().sum() > 0 for name, p in pipe.transformer.named_parameters())
    assert Path("bfloat16/pictures/step_0000002/before_after.png").is_file()
