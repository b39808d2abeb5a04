"""The Python of README and docs runs pasted alone into a fresh interpreter, and the face has what it promises."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mfm_lightning

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *(ROOT / f"docs/{name}.md" for name in ("index", "methods"))]
PAGES += sorted((ROOT / "docs/concepts").glob("*.md"))
TEXT = "\n".join(page.read_text() for page in PAGES)
BLOCKS = list(dict.fromkeys(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)))  # one that stands twice runs once
# by what a block has: what is true once it has run
PROMISES = {
    "draws = model.sample_posterior(x_t, t, num_samples=8)": "assert draws.shape == (4, 8, 1, 28, 28)\n"
    "assert draws.isfinite().all()",
    "draws = model.sample_posterior(x_t, 0.1": "assert draws.shape == (2, 8, 1, 28, 28) and draws.isfinite().all()",
    "images = sample_ode": "assert images.shape == (4, 1, 28, 28) and images.mean() < 0",
    "register": "import torch\n"
    "assert 'top_heavy' in mfm_rewards.available()\n"
    "image = torch.ones(2, 1, 8, 8); image[1, :, :4] = 0\n"
    "assert mfm_rewards.build('top_heavy')(image).tolist() == [0, -1]",
    "Steering(clip=2.0)": "assert result.images.shape == (16, 1, 28, 28) and result.nfe_per_sample == 500\n"
    "assert result.rewards.mean() > 0.18",  # the base flow: 0.13
    "Steering(DrawGradient(num_draws=4))": "assert result.rewards.shape == (16,) and result.nfe_per_sample > 100\n"
    "from pathlib import Path\n"
    "assert Path('steered.png').stat().st_size > 100",
    'save_image(result.images, "threes.png"': "assert result.rewards.median() > -2\n"  # the base flow: -6.3
    "assert result.nfe_per_sample == 125\n"
    "from pathlib import Path\n"
    "assert Path('threes.png').stat().st_size > 100",
}


def promise(block: str) -> str:
    """What is promised of a block."""
    found = [code for words, code in PROMISES.items() if words in block]
    assert len(found) == 1, f"name in PROMISES what is true once this has run:\n{block}"
    return found[0]


# what a researcher reaches for, by kind
NEEDED = {
    "model": ["MetaFlowMap", "DiT", "UNet", "MLP"],
    "loading": ["load_model", "save_model", "load_value", "import_checkpoint", "export_checkpoint"],
    "target": ["Target", "PixelDecoder", "VAEDecoder", "IdentityDecoder"],
    "conditions": ["Conditions"],
    "methods": ["AlignmentMethod", "Steering", "Search", "BestOfN", "FeynmanKac", "TwistedSMC", "PolicySampling"],
    "functions": ["steer", "search", "best_of_n"],
    "estimators": ["DrawValue", "DenoisedValue", "DrawGradient", "DrawGradientFree", "DPSGradient", "NetworkGradient"],
    "posteriors": ["FlowMapPosterior", "GlassPosterior", "RolloutPosterior", "OraclePosterior"],
    "samplers": ["sample_ode", "sample_sde", "sample_refinement", "sample_posterior_glass", "glass_velocity"],
    "oracles": ["GaussianMixture", "EmpiricalDistribution"],
    "modules": ["MFMPretraining", "ValueEstimation", "RewardFinetuning", "RewardAlignment"],
    "data modules": [
        "DigitsDataModule",
        "GaussianMixtureDataModule",
        "ImageDataModule",
        "LatentDataModule",
        "LatentShards",
        "NoiseDataModule",
        "WebDatasetDataModule",
    ],
}


def python(code: str, folder: Path) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def listed() -> list[str]:
    """The names of `__init__.pyi`."""
    tree = ast.parse((ROOT / "mfm_lightning/__init__.pyi").read_text())
    return [
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]


def test_every_block_has_a_promise():
    assert len(BLOCKS) >= 5
    assert all(map(promise, BLOCKS))


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=[f"block {i}" for i in range(len(BLOCKS))])
def test_an_example_runs_alone(block, tmp_path, digits_outputs):
    python(f"import torch\ntorch.manual_seed(0)\n{block}\n{promise(block)}\n", tmp_path)


def test_the_face_is_light_and_complete(tmp_path):
    code = "import sys, mfm_lightning; print('torch' in sys.modules, *dir(mfm_lightning))"
    heavy, *names = python(code, tmp_path).split()
    assert heavy == "False"
    assert set(listed()) <= set(names)


@pytest.mark.parametrize("kind", NEEDED)
def test_nothing_that_is_needed_is_missing(kind):
    assert [name for name in NEEDED[kind] if name not in listed()] == []


@pytest.mark.parametrize("name", [name for name in listed() if name != "__version__"])
def test_a_name_resolves_and_says_what_it_is(name):
    found = getattr(mfm_lightning, name)
    assert found.__module__.startswith("mfm_lightning.")
    assert vars(found).get("__doc__") if isinstance(found, type) else found.__doc__
    generated = f"{name}("  # what a dataclass without a docstring gets
    assert not found.__doc__.startswith(generated)


def test_help_names_what_the_face_has():
    """Each name in the docstring is one of the face."""
    words = set(re.findall(r"\b(?:[A-Z]\w*[A-Z]\w*|\w+_\w+)\b", mfm_lightning.__doc__))
    assert words - set(listed()) <= {"ICML", "mfm_lightning", "__init__"}
