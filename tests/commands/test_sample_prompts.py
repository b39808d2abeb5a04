"""`mfm sample FLOW --prompts FILE`: the pipeline's own pictures, by any number of processes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mfm_lightning.commands.main import run
from mfm_lightning.interpolant import sample_generators
from tests.backbones import encoders, tiny
from tests.backbones.fast import frozen  # noqa: F401


def test_prompts_give_the_pipelines_pictures_in_an_evaluators_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = tiny.sd3(**encoders.of_sd3(tmp_path / "words"))
    pipe.save_pretrained("pipe")
    pipe.set_progress_bar_config(disable=True)
    rows = [{"prompt": "a red cat", "tag": "x"}, {"prompt": "the dog", "seed": 5, "tag": "y"}]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"output": "out", "layout": "geneval", "steps": 3, "images-per-prompt": 2, "torch-dtype": "float32"}
    options |= {"image-size": 16, "guidance": 3, "prompts": "prompts.jsonl"}
    command = ["sample", "pipe", *(f"--{name}={value}" for name, value in options.items())]
    for rank in (1, 0):  # two processes, one after the other
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        run(command)
    assert sorted(str(p) for p in Path("out").rglob("*.png")) == [
        f"out/0000{p}/samples/000{k}.png" for p in range(2) for k in range(2)
    ]
    assert json.loads(Path("out/00001/metadata.jsonl").read_text()) == {"prompt": "the dog", "tag": "y"}
    lines = [json.loads(x) for p in sorted(Path("out").glob("lines_*")) for x in p.read_text().splitlines()]
    assert sorted((line["index"], line["seed"]) for line in lines) == [(0, 0), (1, 0), (2, 5), (3, 5)]
    assert {line["nfe"]["network"] for line in lines} == {3 * 2}  # three steps, with guidance by two evaluations
    for prompt, (seed, number), file in (
        ("a red cat", (0, 1), "out/00000/samples/0001.png"),
        ("the dog", (5, 0), "out/00001/samples/0000.png"),
    ):
        (generator,) = sample_generators(seed, [number])
        x0 = torch.randn(1, tiny.CHANNELS, 8, 8, generator=generator)
        theirs = pipe(prompt, height=16, width=16, num_inference_steps=3, guidance_scale=3.0, latents=x0).images[0]
        assert np.abs(np.array(theirs).astype(int) - np.array(Image.open(file)).astype(int)).max() <= 1


def test_options_of_the_other_kind_are_refused(tmp_path):
    output = ["--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="--labels is not for a text-to-image flow with --prompts"):
        run(["sample", "pipe", *output, "--prompts", "p.txt", "--labels", "1"])
    with pytest.raises(ValueError, match="--layout is for a text-to-image flow with --prompts"):
        run(["sample", "mnist", *output, "--layout", "geneval"])
