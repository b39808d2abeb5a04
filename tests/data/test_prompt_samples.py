"""A flow's samples for prompts in place of images: diffusers' own, drawn once, by any number of ranks."""

import csv
from typing import Any

import lightning as L
import pytest
import torch

from mfm_lightning.alignment import GlassPosterior
from mfm_lightning.backbones import TextToImageFlow, load_flow
from mfm_lightning.commands.main import run
from mfm_lightning.data import OffPolicyDataModule, PromptSamplesDataModule
from mfm_lightning.data.latents.verify import verify
from mfm_lightning.interpolant import sample_generators
from mfm_lightning.modules import Optimization, PromptFinetuning
from tests.backbones import encoders, tiny
from tests.backbones.fast import frozen  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["a red cat", "the blue dog", "three dog on the mat a red"]
TOKENS = 6


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    tiny.sd3(**encoders.of_sd3(folder / "words")).save_pretrained(folder / "flow")
    return folder / "flow"


def flow_of(sd3):
    return load_flow(sd3, 16, "float32", max_sequence_length=TOKENS)


def data(folder, flow, **more) -> Any:
    given = {"num_samples": 7, "steps": 3, "guidance": 2.5, "shard_size": 2, "batch_size": 2, "val_shards": 0}
    given |= {"num_workers": 0, "embeddings": "fp32", "seed": 5, **more}
    return PromptSamplesDataModule(PROMPTS, str(folder), flow=flow, **given)


def states(module):
    """By the sample's number, in one pass over all."""
    module.setup()
    found = {}
    for x1, given in module.loader(length=3):
        for row, prompt in enumerate(given["prompts"]):
            found.setdefault(prompt, []).append(x1[row])
    return found


@torch.no_grad()
def test_samples_are_those_of_the_pipeline(sd3, tmp_path):
    flow = flow_of(sd3)
    module = data(tmp_path / "samples", flow, batch_size=7)
    module.setup()
    x1, given = next(iter(module.loader(length=1)))
    pipe = tiny.diffusers.StableDiffusion3Pipeline.from_pretrained(sd3)
    pipe.set_progress_bar_config(disable=True)
    for i in range(7):
        prompt, (noise,) = PROMPTS[i % 3], sample_generators((5, 17), [i])
        expected = pipe(
            prompt, height=16, width=16, num_inference_steps=3, guidance_scale=2.5, output_type="latent",
            max_sequence_length=TOKENS, latents=torch.randn(1, *flow.state_shape, generator=noise),
        ).images[0]  # fmt: skip
        distances = [(x - expected).abs().max() for x in x1]
        row = int(torch.stack(distances).argmin())
        assert distances[row] < 4e-3 * expected.abs().max()  # of half precision
        assert given["prompts"][row] == prompt
        text, _, pooled, _ = pipe.encode_prompt(
            prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=TOKENS, device="cpu"
        )
        torch.testing.assert_close(given["text"][row], text[0])
        torch.testing.assert_close(given["pooled"][row], pooled[0])
    verify(str(tmp_path / "samples"))
    assert flow.keep_encoders is False


def test_they_are_drawn_once_and_the_same_by_any_ranks(sd3, tmp_path, monkeypatch):
    drawn, draw = [], PromptSamplesDataModule.draw

    def counted(self, flow, rows):
        drawn.extend(rows)
        return draw(self, flow, rows)

    monkeypatch.setattr(PromptSamplesDataModule, "draw", counted)
    data(tmp_path / "one", flow_of(sd3)).setup()
    assert drawn == list(range(7))
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").glob("*.tar")}
    assert len(files) == 4
    # rank 1 first, which then waits for rank 0
    monkeypatch.setattr(PromptSamplesDataModule, "_wait_for", lambda *_: (_ for _ in ()).throw(InterruptedError))
    drawn.clear()
    second = data(tmp_path / "two", flow_of(sd3))
    monkeypatch.setattr(second, "rank", lambda: (1, 2))
    with pytest.raises(InterruptedError):
        second.setup()
    assert drawn == [2, 3, 6]
    monkeypatch.undo()
    monkeypatch.setattr(PromptSamplesDataModule, "draw", counted)
    drawn.clear()
    first = data(tmp_path / "two", flow_of(sd3))
    monkeypatch.setattr(first, "rank", lambda: (0, 2))
    first.setup()
    assert drawn == [0, 1, 4, 5]
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").glob("*.tar")}
    # read again: nothing is drawn, and no text encoder loaded
    drawn.clear()
    monkeypatch.setattr(TextToImageFlow, "whole_pipeline", None)
    again = data(tmp_path / "two", flow_of(sd3))
    assert states(again).keys() == set(PROMPTS)
    assert not drawn
    assert again.embedded.null["text"].shape == (1, 77 + TOKENS, tiny.TEXT)
    for change, message in (
        ({"guidance": 3.0}, "guidance was 2.5, is 3.0"),
        ({"seed": 6}, "seed was 5, is 6"),
        ({"steps": 4}, "steps was 3, is 4"),
    ):
        with pytest.raises(ValueError, match=rf"two has a preparation with other settings \({message}\)"):
            data(tmp_path / "two", flow_of(sd3), **change).setup()
    with pytest.raises(ValueError, match="num_samples 0 must be at least 1"):
        data(tmp_path / "x", None, num_samples=0)
    with pytest.raises(
        ValueError, match=r"num_samples 7: without 3 shards of 2 for validation 2 are left, not a batch"
    ):
        data(tmp_path / "x", flow_of(sd3), val_shards=3, batch_size=3).setup()
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match=r"no flow to sample: set data\.flow"):
        data(tmp_path / "x", None).setup()


def test_a_policy_is_trained_on_its_bases_samples_and_its_own(sd3, tmp_path, monkeypatch):
    """The data that are there only once they are drawn, within an OffPolicyDataModule; the base draws them."""
    module = PromptFinetuning(
        flow_of(sd3), "brightness", posterior=GlassPosterior(1), rank=2, guidance=1.0,
        optimization=Optimization("adamw", 0.01, warmup_steps=0),
    )  # fmt: skip
    settings = {"guidance": 2.5, "batch_size": 4, "val_shards": 1, "shard_size": 4, "num_samples": 12}
    own = data(tmp_path / "own", None, **settings)
    mixed = OffPolicyDataModule(own, policy_share=0.5, buffer_size=4, refresh_every=1, ode_steps=1)
    trainer = L.Trainer(
        max_steps=2, max_epochs=1, default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, accelerator="cpu", limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, mixed)
    assert trainer.global_step == 2
    assert mixed.state_shape == (tiny.CHANNELS, 8, 8)
    assert own.embedded is not None
    data(tmp_path / "theirs", flow_of(sd3), **settings).setup()
    files = [{path.name: path.read_bytes() for path in (tmp_path / n).glob("*.tar")} for n in ("own", "theirs")]
    assert files[0] == files[1]
    assert len(files[0]) == 3


def test_an_adapter_is_trained_on_its_own_flows_samples(sd3, tmp_path, monkeypatch):
    """The config, with prompts alone; the second run draws nothing, and has the losses of the first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    network = "--model.init_args.network.init_args"
    command = [
        "fit", "--config", "text_to_image/sd3/mfm", f"{network}.name={sd3}", f"{network}.rank=2",
        f"{network}.image_size=16", f"{network}.max_sequence_length={TOKENS}", f"{network}.torch_dtype=float32",
        "--data=mfm_lightning.data.PromptSamplesDataModule", "--data.init_args.prompts=prompts.txt",
        "--data.init_args.folder=samples", "--data.init_args.num_samples=6", "--data.init_args.shard_size=2",
        "--data.init_args.steps=2", "--data.init_args.batch_size=2", "--data.init_args.num_workers=0",
        "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.accelerator=cpu",
        "--trainer.accumulate_grad_batches=1", "--trainer.log_every_n_steps=1",
    ]  # fmt: skip
    log = tmp_path / "outputs/text_to_image/sd3/mfm/logs/csv/metrics.csv"

    def losses():
        return [row["train/loss"] or row["val/loss"] for row in csv.DictReader(log.read_text().splitlines())]

    run(command)
    before = losses()
    monkeypatch.setattr(PromptSamplesDataModule, "draw", None)
    monkeypatch.setattr(TextToImageFlow, "whole_pipeline", None)
    run([*command, "--overwrite"])
    assert len(before) == 3
    assert losses() == before
