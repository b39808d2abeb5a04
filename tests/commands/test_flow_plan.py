"""The memory plan of text-to-image flows against what real runs allocate, and against published sizes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from mfm_benchmarks.timing import peak_bytes
from mfm_lightning.alignment import (  # fmt: skip
    BestOfN,
    DPSGradient,
    DrawGradient,
    FeynmanKac,
    GlassPosterior,
    Search,
    Steering,
    Target,
    TwistedSMC,
)
from mfm_lightning.backbones import TextToImageFlow
from mfm_lightning.backbones.published import PUBLISHED
from mfm_lightning.commands import flow_planning
from mfm_lightning.commands.errors import CommandLineError
from mfm_lightning.commands.flow_planning import CHECKPOINTED, DECODING, DRIFT, GRADIENT, plan_flow, rows_of
from mfm_lightning.commands.main import run
from mfm_lightning.commands.planning import Allocations
from mfm_lightning.conditions import Conditions
from tests.backbones import tiny
from tests.backbones.fast import frozen  # noqa: F401
from tests.backbones.test_parity import FAMILIES

TOKENS = {"sd3": 77 + 256, "flux": 512, "sana": 300}
SIDES = {"sd3": 32, "flux": 32, "sana": 128}


def text(family: str, dtype: torch.dtype) -> Conditions:
    """Of one prompt, as the pipeline's own encoders give it."""
    given = {"text": torch.randn(1, TOKENS[family], tiny.TEXT).to(dtype)}
    if family == "sana":
        given["mask"] = torch.ones(1, TOKENS[family], dtype=torch.long)
    else:
        given["pooled"] = torch.randn(1, tiny.POOLED).to(dtype)
    if family == "flux":
        return Conditions(guidance=3.5, **given)
    return Conditions(guidance=5.0, **given, **{f"negative_{name}": value for name, value in given.items()})


def flow_of(family: str, dtype: torch.dtype, max_rows: int, checkpointing: bool = False) -> TextToImageFlow:
    kind, build, _ = FAMILIES[family]
    pipe = build()
    for part in (pipe.transformer, pipe.vae):
        nn.Module.to(part, dtype)
    return kind(pipe, image_size=SIDES[family], max_rows=max_rows, checkpointing=checkpointing)


def work(flow: TextToImageFlow, family: str, rows: int) -> dict[str, Callable[[], object]]:
    def given() -> Conditions:
        return text(family, flow.transformer.dtype)

    def noise() -> torch.Tensor:
        return torch.randn(rows, *flow.state_shape)

    def gradient() -> object:
        target = Target(flow, lambda images: images.mean(dim=(1, 2, 3)), flow.decoder, given())
        return DPSGradient()(target, 0.5, noise())

    return {
        DRIFT: torch.no_grad()(lambda: flow.drift(0.5, noise(), given())),
        DECODING: torch.no_grad()(lambda: flow.decoder(noise())),
        GRADIENT: gradient,
    }


BELOW = {("sana", DECODING): 0.2}  # the CPU's convolutions have a buffer of the size of their input's windows


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("family", ["sd3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flux", "sana"))])
def test_peaks_are_those_of_real_runs(tmp_path, family):
    """Within 10 % of what torch's profiler counts on the CPU, of real weights in float32; never above."""
    FAMILIES[family][1]().save_pretrained(tmp_path)
    plan = plan_flow(str(tmp_path), SIDES[family], "float32", 2, batch_size=2)
    flow = flow_of(family, torch.float32, 2)
    real = {what: peak_bytes(step, torch.device("cpu")) for what, step in work(flow, family, 2).items()}
    flow.enable_checkpointing()
    real[CHECKPOINTED] = peak_bytes(work(flow, family, 2)[GRADIENT], torch.device("cpu"))
    assert real[CHECKPOINTED] < real[GRADIENT]
    for what, size in real.items():
        most = BELOW.get((family, what), 0.1)
        assert 1 - most < plan.peaks[what] / size < 1.01, (what, plan.peaks, real)
    for part, network in {"transformer": flow.transformer, "vae": flow.decoder.vae}.items():
        assert plan.parameters[part] == sum(p.numel() for p in network.parameters())
        assert plan.weights[part] == sum(t.nbytes for t in (*network.parameters(), *network.buffers()))


@pytest.mark.slow
def test_many_rows_are_extrapolated(tmp_path):
    """Four parts from one and two, in bfloat16: as the tensors of a real run, which are counted by the same rule."""
    tiny.sd3().save_pretrained(tmp_path)
    plan = plan_flow(str(tmp_path), SIDES["sd3"], "bfloat16", 1, method=FeynmanKac(num_particles=4))
    assert plan.rows == 4
    flow = flow_of("sd3", torch.bfloat16, 1)
    for what, step in work(flow, "sd3", 4).items():
        with Allocations(flow) as counted:
            step()
        assert plan.peaks[what] == pytest.approx(counted.peak, rel=0.02), what


def test_published_sizes_are_those_of_their_names():
    """Billions of parameters, as the models' pages and papers say them; SD3's T5 is the 4.7 of the 11 in its paper."""
    said = {"3-medium": 2.0, "3.5-medium": 2.2, "3.5-large": 8.1, "dev": 11.9, "schnell": 11.9, "Sana_1600M": 1.6}
    for name, (_, parts) in PUBLISHED.items():
        made = {part: flow_planning._on_meta(*described, torch.bfloat16) for part, described in parts.items()}
        numbers = {part: sum(p.numel() for p in network.parameters()) / 1e9 for part, network in made.items()}
        expected = next(number for key, number in said.items() if key in name)
        assert numbers["transformer"] == pytest.approx(expected, abs=0.05), name
        assert numbers["vae"] == pytest.approx(0.312 if "Sana" in name else 0.084, abs=0.001)
        assert sum(v for k, v in numbers.items() if k.startswith("text")) == pytest.approx(
            2.61 if "Sana" in name else 4.89 if "FLUX" in name else 5.58, abs=0.01
        )


def test_rows_of_methods():
    assert rows_of(None, 3) == rows_of(Steering(DPSGradient()), 3) == 3
    assert rows_of(Steering(DPSGradient(max_rows=2)), 3) == 2
    assert rows_of(Search(num_particles=2, num_draws=5), 3) == 30
    assert rows_of(FeynmanKac(num_particles=4), 3) == 12
    assert rows_of(BestOfN(num_candidates=8, max_rows=8), 2) == 8
    assert rows_of(BestOfN(num_candidates=8, max_rows=1024), 2) == 16


@pytest.fixture
def pipeline(tmp_path) -> Path:
    tiny.sd3().save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


def config(folder: Path, method: str, **flow) -> list[str]:
    """A packaged config for a flow of one's own."""
    settings = yaml.safe_load(Path(f"configs/text_to_image/sd3/{method}.yaml").read_text())
    settings["model"]["init_args"]["flow"]["init_args"] |= flow
    (folder / f"{method}.yaml").write_text(yaml.safe_dump(settings))
    return ["plan", "--config", str(folder / f"{method}.yaml")]


@pytest.mark.slow
def test_the_command_and_what_it_says(tmp_path, capsys, pipeline):
    run([*config(tmp_path, "search", name=str(pipeline), image_size=16), "--memory", "0.0001"])
    said = " ".join(capsys.readouterr().out.split())
    assert "by Search, 1 at once (4 states in the flow, max_rows 1)" in said
    assert "no gradients" in said
    assert "too much" in said
    run([*config(tmp_path, "steer", name=str(pipeline)), "--image-size", "32", "--max-rows", "2", "--batch-size", "3"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "images of 32 x 32 in bfloat16, by Steering, 3 at once (3 states in the flow, max_rows 2)" in shown
    assert "too much" not in shown
    assert "gradients, checkpointing true" in shown


def test_errors(tmp_path, pipeline):
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing.*mfm plan knows the sizes of stabilityai/stable"):
        run(config(tmp_path, "steer", name="nobody/nothing"))
    with pytest.raises(ValueError, match="load_flow has no 'max_row', only name, image_size"):
        run(config(tmp_path, "steer", name=str(pipeline), max_row=2))
    with pytest.raises(ValueError, match="image_size 33 x 33: height and width must be multiples of 4"):
        run([*config(tmp_path, "steer", name=str(pipeline)), "--image-size", "33"])
    with pytest.raises(CommandLineError, match="--devices is for training"):
        run([*config(tmp_path, "steer", name=str(pipeline)), "--devices", "2"])
    with pytest.raises(CommandLineError, match="--max_rows is for text-to-image configs"):
        run(["plan", "--config", "gmm/mfm", "--max-rows", "2"])
    with pytest.raises(CommandLineError, match="must be at least 1"):
        run(["plan", "--config", "gmm/mfm", "--batch-size", "-1"])
    (pipeline / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(ValueError, match=r"a StableDiffusionPipeline: mfm plan knows the memory of SD3Flow"):
        plan_flow(str(pipeline))
    tiny.lumina2().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"a Lumina2Pipeline: mfm plan knows"):
        plan_flow(str(tmp_path / "other"))
    tiny.sd3().save_pretrained(pipeline)
    gradients = Steering(DrawGradient(2, GlassPosterior(2)))
    with pytest.raises(ValueError, match="knows gradients of one clean state, such as DPSGradient"):
        plan_flow(str(pipeline), 16, method=gradients)
    assert plan_flow(str(pipeline), 16, method=TwistedSMC(num_particles=2)).rows == 2
    shutil.rmtree(pipeline / "vae")
    with pytest.raises(ValueError, match="has no vae"):
        plan_flow(str(pipeline), 16)


def test_another_vae_and_more_tokens_are_planned(tmp_path, pipeline):
    """The other VAE's weights; and more text, which the drift carries: 64 tokens of 12 numbers for both prompts."""
    other = tiny.kl_vae(shift=0.0)
    wider = type(other).from_config({**other.config, "block_out_channels": [16, 16]})
    wider.save_pretrained(tmp_path / "vae")
    short = plan_flow(str(pipeline), 16, "float32", max_sequence_length=8)
    long = plan_flow(str(pipeline), 16, "float32", max_sequence_length=72, vae=str(tmp_path / "vae"))
    assert long.parameters["vae"] == sum(p.numel() for p in wider.parameters()) > short.parameters["vae"]
    assert long.peaks[DRIFT] - short.peaks[DRIFT] > 2 * 64 * tiny.TEXT * 4
