"""The section of docs/text_to_image.md on captioned images, as written: its commands and its YAML, at tiny sizes."""

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from mfm_lightning.commands.main import run
from mfm_lightning.data.latents.index import LatentIndex
from tests.backbones import encoders, tiny
from tests.backbones.fast import frozen  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/text_to_image.md").read_text()
SECTION = TEXT[TEXT.index("### Captioned images to an adapter") : TEXT.index("## Conventions")]
BASH, YAML = (re.search(rf"```{kind}\n(.*?)```", SECTION, re.DOTALL) for kind in ("bash", "yaml"))
NETWORK = "--model.init_args.network.init_args"
SHORT = ["--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.accumulate_grad_batches=1"]
SHORT += [f"{NETWORK}.image_size=16", f"{NETWORK}.torch_dtype=float32", f"{NETWORK}.max_sequence_length=6"]
SHORT += [f"{NETWORK}.rank=2", "--data.init_args.batch_size=2", "--data.init_args.num_workers=0"]


def commands() -> list[list[str]]:
    assert BASH
    text = re.sub(r"#.*", "", BASH[1].replace("\\\n", " "))
    return [shlex.split(line)[1:] for line in text.splitlines() if line.strip()]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, with six captioned pictures, prompts and a flow."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    random = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(random.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(f"pictures/{i}.png")
        Path(f"pictures/{i}.txt").write_text(["a red cat", "the dog", "a mat"][i % 3])
    Path("prompts.txt").write_text("a red cat\nthe dog\n")
    tiny.sd3(**encoders.of_sd3(tmp_path / "words")).save_pretrained(tmp_path / "flow")
    return tmp_path


def test_the_commands_and_the_samples_in_place_of_images(place):
    prepare, fit = commands()
    assert prepare[0] == "prepare-latents"
    for name, value in (("--flow", str(place / "flow")), ("--image-size", "16"), ("--precision", "fp32")):
        prepare[prepare.index(name) + 1] = value
    prepare.remove("--allow-download")
    small = ["--shard-size", "2", "--device", "cpu", "--max-sequence-length", "6"]
    run([*prepare, *small])
    where = prepare[prepare.index("--output") + 1]
    assert LatentIndex.load(where).samples == 6
    assert (
        yaml.safe_load((ROOT / "configs/text_to_image/sd3/mfm.yaml").read_text())["data"]["init_args"]["folder"]
        == where
    )
    run([*fit, f"{NETWORK}.name={place / 'flow'}", *SHORT, "--trainer.accelerator=cpu"])
    assert YAML
    section: dict[str, Any] = yaml.safe_load(YAML[1])["data"]
    given = {**section["init_args"], "num_samples": 6, "steps": 2, "shard_size": 2}
    data = [f"--data={section['class_path']}", *(f"--data.init_args.{k}={v}" for k, v in given.items())]
    run([*fit, *data, f"{NETWORK}.name={place / 'flow'}", *SHORT, "--trainer.accelerator=cpu", "--overwrite"])
    assert LatentIndex.load(given["folder"]).made_with["guidance"] == 4.5


@pytest.mark.parametrize("family", ["sd3", "flux", "sana"])
def test_the_bytes_that_the_page_tells(family):
    """Of the published sizes of the text encoders, by the rules of a shard."""
    from mfm_lightning.data.latents.index import Layout
    from mfm_lightning.data.latents.text_form import TextForm

    tokens, width, pooled, state = {
        "sd3": (77 + 256, 4096, 2048, (16, 64, 64)), "flux": (512, 4096, 768, (16, 64, 64)),
        "sana": (300, 2304, None, (32, 32, 32)),
    }[family]  # fmt: skip
    more = ("mask", "int64", (tokens,)) if pooled is None else ("pooled", "bf16", (pooled,))
    form = TextForm((more, ("text", "bf16", (tokens, width))))
    total, own = Layout(state, form).stride / 1e6, form.file_bytes / 1e6
    told = {"sd3": r"{} MB of {} MB for SD3", "flux": r"{} of {} for FLUX", "sana": r"{} of {} for SANA"}[family]
    assert told.format(f"{own:.1f}", f"{total:.1f}") in " ".join(SECTION.split())
    config = (ROOT / f"configs/text_to_image/{family}/mfm.yaml").read_text()
    assert f"{total:.1f} MB each" in config
