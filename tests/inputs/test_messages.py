"""Names and configs that messages, tables and reports must carry as they are."""

import json
import re
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import mfm_rewards
from mfm_benchmarks.blocks import Page, Picture, Table
from mfm_benchmarks.report import write_report
from mfm_lightning.checkpoints import save_model
from mfm_lightning.commands.main import main, run
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import DiT
from mfm_lightning.utils.configs import SHIPPED
from mfm_lightning.utils.console import console, progress_bar, track, write_table

BRACKETS = ["plain", "a [0 or 1]", "[/red]", "[bold]b[/bold]", ":smile:", "[link=x]"]


# -- brackets


@pytest.mark.parametrize("name", BRACKETS)
def test_brackets_in_names_are_shown_as_they_are(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "200")
    write_table([{name: 1.0, "file": name}], name, tmp_path, "table")
    file = name.replace("/", "|")
    Image.new("RGB", (4, 4), (255, 255, 255)).save(tmp_path / f"{file}.png")
    run(["rewards", "--score", "brightness", "--images", str(tmp_path), "--device", "cpu"])
    shown = capsys.readouterr().out
    assert shown.count(name) >= 3
    assert f"{file}.png" in shown
    with progress_bar() as progress, console().capture() as captured:
        progress.update(progress.add_task("", total=1), description=name)
        console().print(progress.get_renderable())
    assert name in captured.get()
    assert list(track([name], describe=str)) == [name]


def test_brackets_in_a_reward_of_the_users_own(capsys, tmp_path):
    mfm_rewards.register("mine [x]", lambda images: images.mean(dim=(1, 2, 3)))
    try:
        run(["rewards", "--show", "mine [x]"])
        run(["rewards"])
        assert capsys.readouterr().out.count("mine [x]") == 2
    finally:
        mfm_rewards.registry._FACTORIES.pop("mine [x]")


# -- reports


@pytest.mark.parametrize("names", [["a_b", "a_b"], ["a_b", "A_b", "a_B"], ["a_b", "a_b_2", "a_b"]])
def test_blocks_of_one_name_have_files_of_their_own(tmp_path, names):
    blocks = [Picture(name, f"picture {i}", Figure()) for i, name in enumerate(names)]
    blocks += [Table(name, "t", [{"number": i}]) for i, name in enumerate(names)]
    write_report(Page("p", "a", blocks), tmp_path)
    files = [path.name.lower() for path in tmp_path.iterdir()]
    assert len(set(files)) == len(files)
    assert len([f for f in files if f.endswith(".png")]) == len(names)
    numbers = [
        json.loads(p.read_text()) for p in tmp_path.glob("*.json") if p.name not in ("environment.json", "page.json")
    ]
    assert sorted(rows[0]["number"] for rows in numbers) == list(range(len(names)))
    page = (tmp_path / "index.html").read_text()
    assert len(set(re.findall(r"data:image/svg[^\"]+", page))) <= len(names)


# -- configs


@pytest.mark.parametrize(
    ("change", "key", "lines"),
    [
        (lambda text: text + "trainer:\n  max_steps: 2\n", "trainer", None),
        (lambda text: text.replace("  max_steps:", "  max_steps: 3\n  max_steps:"), "max_steps", None),
        (lambda text: text + "seed_everything: 1\n", "seed_everything", None),
        (lambda _: "a: &x {b: 1}\nc: {<<: *x, b: 2, b: 3}\n", "b", "line 2"),
        (lambda _: "- {a: 1}\n- {q: [{w: 1, w: 2}]}\n", "w", "line 2"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(tmp_path, capsys, change, key, lines):
    text = change((SHIPPED / "digits/flow.yaml").read_text())
    (tmp_path / "twice.yaml").write_text(text)
    at = [i for i, line in enumerate(text.splitlines(), 1) if re.match(rf"\s*{key}:", line)]
    where = lines or f"lines {at[0]} and {at[1]}"
    for command in (["fit"], ["plan"], ["benchmark", "gmm"], ["test"]):
        with pytest.raises(SystemExit) as stop:
            main([*command, "--config", str(tmp_path / "twice.yaml")])
        assert f"twice.yaml: the key '{key}' stands twice, in {where}" in str(stop.value.code)


def test_keys_that_stand_twice_in_options_and_merges_that_override(tmp_path, capsys):
    for args in (
        ["fit", "--config", "digits/flow", "--trainer", "{max_steps: 3, max_steps: 4}"],
        ["fit", "--config", "digits/flow", "--ema", "{decay: 0.9, decay: 0.8}"],
    ):
        with pytest.raises(SystemExit):
            main(args)
        assert "stands twice" in capsys.readouterr().err
    (tmp_path / "merged.yaml").write_text("a: &x {b: 1, c: 2}\nd: {<<: *x, b: 3}\ne: [*x, *x]\n")
    from mfm_lightning.utils.configs import read_config

    assert read_config(tmp_path / "merged.yaml")["d"] == {"b": 3, "c": 2}


def test_a_config_with_a_byte_order_mark_is_read(tmp_path, capsys):
    text = (SHIPPED / "gmm/mfm.yaml").read_text()
    (tmp_path / "bom.yaml").write_text("\ufeff" + text, encoding="utf-8")
    with pytest.raises(SystemExit):
        run(["fit", "--config", str(tmp_path / "bom.yaml"), "--print_config"])
    assert "max_steps" in capsys.readouterr().out


# -- folders of samples


@pytest.fixture
def model(tmp_path):
    network = DiT(8, 4, 1, 16, 2, 2, 1, num_classes=3, guidance_scales=())
    return str(save_model(MetaFlowMap(network), tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", ["00000000.png", "holiday.png", "samples.npz", "samples-000000.tar"])
def test_files_of_others_are_neither_adopted_nor_written_over(model, tmp_path, capsys, name):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / name).write_bytes(b"of somebody else")
    (folder / "notes.txt").write_text("may be there")
    args = ["sample", model, "--output", str(folder), "--num-samples", "2", "--device", "cpu"]
    for form in ("png", "npz", "webdataset"):
        with pytest.raises(SystemExit) as stop:
            main([*args, "--format", form])
        assert f"has files that mfm sample did not write (1, such as {name})" in str(stop.value.code)
    assert (folder / name).read_bytes() == b"of somebody else"
    (folder / name).unlink()
    run(args)
    assert len(list(folder.glob("*.png"))) == 2


def test_an_output_that_is_no_folder_or_damaged_is_one_line(model, tmp_path):
    args = ["sample", model, "--num-samples", "2", "--device", "cpu", "--output"]
    (tmp_path / "file").write_text("x")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/samples.json").write_text('{"model": ')
    for output, message in (("file", "is a file: expected a folder"), ("cut", r"samples.json is no JSON")):
        with pytest.raises(SystemExit) as stop:
            main([*args, str(tmp_path / output)])
        assert message in str(stop.value.code)
        assert "\n" not in str(stop.value.code)


def test_images_that_cannot_be_written_are_one_line_with_the_file(model, tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SystemExit, match=r"mfm: OSError: .*No space left on device: .*00000000.png"):
        main(["sample", model, "--num-samples", "2", "--device", "cpu", "--output", str(tmp_path / "o")])
    assert torch.is_grad_enabled()


def test_the_list_of_rewards_is_read_in_a_narrow_terminal(capsys, monkeypatch):
    """Every name is whole, at the beginning of a line, and beside it what it is, in lines that are not short."""
    monkeypatch.setenv("COLUMNS", "80")
    run(["rewards"])
    text = capsys.readouterr().out
    names = [line.split()[0] for line in text.splitlines() if not line.startswith("  ")]
    assert names == sorted(mfm_rewards.available())
    said = " ".join(text.split())
    assert "hpsv2 Human preference score v2.1 by a CLIP ViT-H/14: the cosine of image and prompt" in said
    assert "needs prompts; 3.9 GB + 0.5 GB/image" in said
    assert re.search("jpeg_compressibility .* no gradient linear_gaussian", said)
    assert len(text.splitlines()) < 3 * len(names)
