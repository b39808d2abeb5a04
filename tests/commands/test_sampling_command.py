"""`mfm sample`: the same samples however they are dealt out, gone on with after a kill, in forms that others read."""

import collections
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mfm_lightning.checkpoints import load_model, save_model
from mfm_lightning.commands.main import run
from mfm_lightning.data.latents.moments import MomentEncoder
from mfm_lightning.interpolant import noise_seed
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import DiT
from mfm_lightning.networks.decoders import VAEDecoder
from mfm_lightning.samplers import sample_ode
from mfm_lightning.sampling import ModelSampler, SamplePlan
from mfm_lightning.utils.distributed import Process
from tests.latent_data import small_vae


def main(args):
    run(["sample", *args])


ROOT = Path(__file__).parents[2]
SMALL = ["--num-samples=10", "--batch-size=4", "--steps=2", "--device=cpu"]


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A file of a random model of pixels, 3 classes, one guidance scale."""
    torch.manual_seed(0)
    network = DiT(16, 8, 3, 32, 2, 2, 1, num_classes=3, guidance_scales=(2.5,))
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return str(save_model(MetaFlowMap(network), tmp_path_factory.mktemp("model") / "model.safetensors"))


def pngs(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def test_the_same_whatever_the_processes_batch_and_number(model, tmp_path, monkeypatch):
    main([model, "--output", str(tmp_path / "one"), *SMALL])
    one = pngs(tmp_path / "one")
    assert one.shape == (10, 16, 16, 3)
    assert len({image.tobytes() for image in one}) == 10
    assert one.std() > 20
    names = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
    for rank, (mine, number) in zip((2, 0, 1), (names[0], names[1], names[0]), strict=True):
        with monkeypatch.context() as patch:
            patch.setenv(mine, str(rank))
            patch.setenv(number, "3")
            main([model, "--output", str(tmp_path / "three"), *SMALL])
    assert (pngs(tmp_path / "three") == one).all()
    main([model, "--output", str(tmp_path / "fewer"), *SMALL, "--num-samples=6"])
    assert (pngs(tmp_path / "fewer") == one[:6]).all()
    main([model, "--output", str(tmp_path / "batch"), *SMALL, "--batch-size=3"])  # sums may round otherwise
    assert np.abs(pngs(tmp_path / "batch").astype(int) - one).max() <= 1
    main([model, "--output", str(tmp_path / "seed"), *SMALL, "--seed=1"])
    assert (pngs(tmp_path / "seed") != one).any(axis=(1, 2, 3)).all()


def test_forms_that_others_read(model, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    for form in ("png", "npz", "webdataset"):
        main([model, "--output", str(tmp_path / form), "--format", form, *SMALL])
    one, labels = pngs(tmp_path / "png"), np.arange(10) % 3
    with np.load(tmp_path / "npz/samples.npz", allow_pickle=False) as file:  # as ADM's evaluator does
        assert (file["arr_0"] == one).all()
        assert file["arr_0"].dtype == np.uint8
        assert (file["arr_1"] == labels).all()
    found = webdataset.WebDataset(str(tmp_path / "webdataset/samples-000000.tar"), shardshuffle=False)
    samples = list(found.decode("rgb8").to_tuple("__key__", "png", "cls"))
    assert [key for key, _, _ in samples] == [f"{i:08d}" for i in range(10)]
    assert (np.stack([image for _, image, _ in samples]) == one).all()
    assert [label for _, _, label in samples] == labels.tolist()
    assert json.loads((tmp_path / "webdataset/index.json").read_text())["shards"] == {"samples-000000.tar": 10}
    for form in ("npz", "webdataset"):
        assert not (tmp_path / form / "parts").exists()
    fidelity = pytest.importorskip("torch_fidelity.utils")
    assert len(fidelity.glob_samples_paths(str(tmp_path / "png"), False, "png", verbose=False)) == 10


KILLED = """
import os, signal, sys
from mfm_lightning.commands.main import run
from mfm_lightning.sampling import outputs
calls, encode, save = [0], outputs.encode_png, outputs.np.save

def dies(inner):
    def write(*arguments):
        calls[0] += 1
        if calls[0] == int(sys.argv[1]):
            with open(os.path.join(sys.argv[4], "killed.partial-0"), "wb") as file:
                file.write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*arguments)
    return write

outputs.encode_png, outputs.np.save = dies(encode), dies(save)
run(["sample", *sys.argv[2:]])
"""


@pytest.mark.parametrize(("form", "call"), [("png", 6), ("npz", 4), ("webdataset", 8)])
@pytest.mark.slow
def test_a_killed_run_is_gone_on_with(model, tmp_path, form, call):
    """Killed within the second batch, while labels are put into the npz, and while shards are written."""
    if form == "webdataset":
        pytest.importorskip("webdataset")
    arguments = [model, "--output", str(tmp_path / "cut"), "--format", form, *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", KILLED, str(call), *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("*.png")}
    assert not (tmp_path / "cut/samples.npz").exists()
    main(arguments)
    main([*arguments[:2], str(tmp_path / "whole"), *arguments[3:]])
    files = {p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*")}
    cut = {p.relative_to(tmp_path / "cut") for p in (tmp_path / "cut").rglob("*")}
    assert cut == files
    for name in files - {Path("samples.npz")}:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    if form == "npz":
        arrays = [np.load(tmp_path / folder / "samples.npz") for folder in ("cut", "whole")]
        assert all((arrays[0][name] == arrays[1][name]).all() for name in ("arr_0", "arr_1"))
    if form == "png":  # the first batch was not drawn again
        assert sum(path.stat().st_mtime_ns == time for path, time in before.items()) == 4
    # a third time there is nothing to do
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "cut").rglob("*") if p.is_file()}
    main(arguments)
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "cut").rglob("*") if p.is_file()}


def test_labels_and_noise_of_a_plan():
    plan = SamplePlan(50_000, tuple(range(1000)), batch_size=512)
    counts = collections.Counter(plan.label(range(50_000)).tolist())
    assert set(counts.values()) == {50}
    shares = [plan.share(Process(rank, 7)) for rank in range(7)]
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(50_000))
    assert len({noise_seed(3, i) for i in range(50_000)}) == 50_000
    assert not {noise_seed(3, i) for i in range(1000)} & {noise_seed(4, i) for i in range(1000)}


def test_samplers_are_the_functions_they_name(model):
    model = load_model(model).eval()
    plan = SamplePlan(4, (0, 1, 2))
    label, x0 = (
        plan.label(range(4)),
        torch.stack([torch.randn(3, 16, 16, generator=g) for g in plan.generators(range(4))]),
    )
    ode = ModelSampler("ode", 3, "heun", 2.5)(model, label, plan.generators(range(4)))
    with torch.no_grad():
        assert torch.equal(ode, sample_ode(lambda t, x: model.drift(t, x, label=label, guidance=2.5), x0, 3, "heun"))
        step = ModelSampler("flow_map", 1)(model, label, plan.generators(range(4)))
        assert torch.equal(step, model.flow_map(0.0, 1.0, x0, 0.0, torch.zeros_like(x0), label=label))
    exact = ModelSampler("refinement", 2)(model, label, plan.generators(range(4)))
    half = ModelSampler("refinement", 2, precision="bf16")(model, label, plan.generators(range(4)))
    assert half.dtype == torch.float32
    assert 0 < (half - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--seed=5"], ValueError, r"samples of other settings, which differ in seed \(seed: 0 there, 5 now\)"),
        (["--labels=0,4"], ValueError, r"labels in 0..4 must lie in 0..3 \(3 is the null label\)"),
        (["--labels=cat"], ValueError, "expected whole numbers, e.g. 281,282"),
        (["--guidance=4"], ValueError, r"guidance 4 is not a scale that this network knows: \[1.0, 2.5\]"),
        (["--steps=0"], ValueError, "must be at least 1"),
        (["--decoder=no/vae"], FileNotFoundError, "no VAE at no/vae"),
        (["--device=toaster"], ValueError, "device 'toaster' cannot be used here"),
    ],
)
def test_what_does_not_fit_is_refused_before_work(model, tmp_path, arguments, error, message):
    if "--seed=5" in arguments:
        main([model, "--output", str(tmp_path), *SMALL])
    if "--decoder=no/vae" in arguments:
        pytest.importorskip("diffusers")
    with pytest.raises(error, match=message):
        main([model, "--output", str(tmp_path), *SMALL, *arguments])


def test_latents_are_decoded_by_a_vae(tmp_path):
    pytest.importorskip("diffusers")
    small_vae(tmp_path / "vae", blocks=2)
    path = str(save_model(MetaFlowMap(DiT(8, 4, 4, 16, 2, 2, 1, num_classes=3)), tmp_path / "latents.safetensors"))
    with pytest.raises(ValueError, match=r"states of shape \(4, 8, 8\) are no pixels: give --decoder"):
        main([path, "--output", str(tmp_path / "out"), *SMALL])
    main([path, "--output", str(tmp_path / "out"), *SMALL, "--num-samples=3", "--decoder", str(tmp_path / "vae")])
    assert pngs(tmp_path / "out").shape == (3, 16, 16, 3)


def test_latents_by_channel_are_decoded_as_the_file_says(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    small_vae(tmp_path / "vae", blocks=2)
    scale, shift = [0.5, 2.0, 1.0, 4.0], [1.0, 0.0, -1.0, 3.0]
    model, said = MetaFlowMap(DiT(8, 4, 4, 16, 2, 2, 1, num_classes=3)), {"scale": scale, "shift": shift}
    path = str(save_model(model, tmp_path / "latents.safetensors", {"latents": json.dumps(said)}))
    arguments = [path, "--output", str(tmp_path / "out"), *SMALL, "--num-samples=3", "--decoder", str(tmp_path / "vae")]
    with pytest.raises(ValueError, match=r"latents.safetensors was trained on latents that .*\(--scale, --shift\)"):
        main(arguments)
    main([*arguments, "--scale", *map(str, scale), "--shift", *map(str, shift)])
    states = ModelSampler(steps=2)(model.eval(), torch.arange(3), SamplePlan(3).generators(range(3)))
    z = states / torch.tensor(scale).reshape(4, 1, 1) + torch.tensor(shift).reshape(4, 1, 1)
    with torch.no_grad():
        decoded = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae").decode(z).sample
    expected = ((decoded + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255
    assert np.abs(pngs(tmp_path / "out") - expected).max() < 0.6


def test_latents_have_the_vae_s_own_scale(tmp_path):
    """As in preparation, and its own shift; what is given wins, and latents scaled by channel are refused by both."""
    diffusers = pytest.importorskip("diffusers")
    folder = small_vae(tmp_path / "vae", blocks=2)
    settings = json.loads((tmp_path / "vae/config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps({**settings, "scaling_factor": 0.13025}))  # SDXL's
    assert MomentEncoder(folder).space.scale == 0.13025
    model = MetaFlowMap(DiT(8, 4, 4, 16, 2, 2, 1, num_classes=3))
    path = str(save_model(model, tmp_path / "latents.safetensors"))
    states = ModelSampler(steps=2)(model.eval(), torch.arange(3), SamplePlan(3).generators(range(3)))
    vae = diffusers.AutoencoderKL.from_pretrained(folder)
    for name, scale, options in (("own", 0.13025, []), ("given", 0.5, ["--scale=0.5"])):
        arguments = [path, "--output", str(tmp_path / name), *SMALL, "--num-samples=3", "--decoder", folder, *options]
        main(arguments)
        with torch.no_grad():
            expected = ((vae.decode(states / scale).sample + 1) / 2).clamp(0, 1) * 255
        assert np.abs(pngs(tmp_path / name) - expected.permute(0, 2, 3, 1).numpy()).max() < 0.6
    with pytest.raises(ValueError, match=r"decoder: .*scale=0\.5.* there, .* now"):
        main(arguments[:-1])
    (tmp_path / "vae/config.json").write_text(json.dumps({**settings, "latents_mean": [0.1] * 4}))
    for use in (MomentEncoder, lambda path: VAEDecoder(path).missing()):
        with pytest.raises(ValueError, match=r"vae has latents_mean \[0\.1.* in its config\.json"):
            use(folder)
    (tmp_path / "vae/config.json").write_text(json.dumps({**settings, "shift_factor": 0.1}))  # as SD3's and FLUX's
    assert MomentEncoder(folder).space.shift == 0.1
    with torch.no_grad():
        expected = ((vae.decode(states / 0.18215 + 0.1).sample + 1) / 2).clamp(0, 1)
        assert torch.allclose(VAEDecoder(folder)(states), expected, atol=1e-5)


def test_ranks_that_cannot_be_are_refused(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"RANK=2 must lie in 0\.\.WORLD_SIZE-1"):
        Process.from_environment()
    monkeypatch.setenv("LOCAL_RANK", "first")
    with pytest.raises(ValueError, match=r"the environment says LOCAL_RANK='first': expected a whole number"):
        Process.from_environment()
