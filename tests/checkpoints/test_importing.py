"""Released weights in and out: sizes from shapes, both conventions of time, Hugging Face's cache, and wrong files."""

import argparse
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from mfm_lightning.alignment.target import TargetSettings
from mfm_lightning.checkpoints import (
    CheckpointError,
    export_checkpoint,
    find_file,
    import_checkpoint,
    load_model,
    load_state_dict,
    read_metadata,
    save_model,
)
from mfm_lightning.checkpoints.architecture import infer_architecture
from mfm_lightning.commands.main import run
from mfm_lightning.networks import DiT, architecture
from tests.parity import ARCHITECTURE, DATA, NOT_IN_SHAPES, weights


def import_main(args):
    run(["import", *args])


def export_main(args):
    run(["export", *args])


@pytest.fixture
def released(tmp_path):
    """A file of released weights, by source."""

    def write(source: str, suffix: str = "safetensors", **changed):
        path = tmp_path / f"{source}.{suffix}"
        state = {k: v for k, v in {**weights(source), **changed}.items() if v is not None}
        save_file(state, path) if suffix == "safetensors" else torch.save({"ema": state, "steps": 3}, path)
        return path

    return write


def check_parity(model, source: str) -> None:
    """Equality with the project's own velocity (those of DMF and SiT take t = 1 for noise)."""
    data = {k.removeprefix("case."): v for k, v in load_file(DATA / f"official_{source}.safetensors").items()}
    with torch.no_grad():
        if source == "mfm":
            condition = {"label": data["label"], "guidance": data["cfg_scale"]}
            found, expected = model.velocity(*(data[k] for k in ("s", "u", "x", "t", "x_t")), **condition), data["v"]
        else:
            s = 1 - data["t"]
            u = 1 - data["r"] if source == "dmf" else s
            found = model.velocity(s, u, data["x"], 0.0, torch.zeros_like(data["x"]), label=data["label"])
            expected = -data["velocity"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("source", ["mfm", "dmf", "sit"])
def test_sizes_are_read_from_the_shapes(released, source):
    model = import_checkpoint(released(source, "pt"), source, **NOT_IN_SHAPES)
    sizes = {**ARCHITECTURE, "guidance_scales": [2.5], "qk_norm": False, "mlp_ratio": 4.0, "flip_time": True}
    assert model.network.config == sizes
    check_parity(model, source)
    with pytest.raises(CheckpointError, match=r"num_heads and encoder_depth cannot be told .* give num_heads=\.\.\."):
        import_checkpoint(released(source), source)


@pytest.mark.parametrize("name", ["S/2", "B/2", "L/4", "XL/2"])
def test_known_sizes_need_no_keyword(name):
    with torch.device("meta"):
        network = DiT(**architecture(name), input_size=32, in_channels=4, num_classes=1000, guidance_scales=())
    assert infer_architecture(network.state_dict(), {}, "file") == {
        k: () if k == "guidance_scales" else v for k, v in network.config.items() if k != "flip_time"
    }


def test_heads_from_qk_norm_and_number_of_scales():
    network = DiT(12, 3, 3, 48, 2, 6, 1, num_classes=7, mlp_ratio=2.0, qk_norm=True, guidance_scales=(2.0, 3.0))
    with pytest.raises(CheckpointError, match="know 2 guidance scales"):
        infer_architecture(network.state_dict(), {"encoder_depth": 1}, "file")
    found = infer_architecture(network.state_dict(), {"encoder_depth": 1, "guidance_scales": [2.0, 3.0]}, "file")
    assert found == {k: v for k, v in network.config.items() if k != "flip_time"}


def test_of_a_2c_head_the_velocity_is_kept(released, caplog):
    changed = {}
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        velocity = weights("sit")[name].unflatten(0, (2, 2, 4))  # features are (p, p, C)
        changed[name] = torch.cat([velocity, torch.randn_like(velocity)], dim=2).flatten(0, 2)
    path = released("sit", "pt", **changed)
    with caplog.at_level(logging.WARNING):
        model = import_checkpoint(path, "sit", **NOT_IN_SHAPES)
    check_parity(model, "sit")
    assert "flip_time=False" in caplog.text
    # the original release takes t = 1 for data: the network is b_t(x) itself
    data = load_file(DATA / "official_sit.safetensors")
    with torch.no_grad():
        drift = import_checkpoint(path, "sit", flip_time=False, **NOT_IN_SHAPES).drift(
            data["case.t"], data["case.x"], label=data["case.label"]
        )
    torch.testing.assert_close(drift, data["case.velocity"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_commands_go_round_bit_for_bit(released, tmp_path, suffix):
    ours, back, again = tmp_path / "ours.safetensors", tmp_path / f"back.{suffix}", tmp_path / "again.safetensors"
    heads = ["--num-heads", "4", "--encoder-depth", "3"]
    import_main([str(released("mfm")), "--output", str(ours), *heads])
    check_parity(load_model(ours), "mfm")
    assert read_metadata(ours)["kind"] == "meta_flow_map"
    export_main([str(ours), "--output", str(back)])
    expected, found = weights("mfm"), load_state_dict(back)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    # what shapes do not tell is in an exported safetensors file
    import_main([str(back), "--output", str(again), *([] if suffix == "safetensors" else heads)])
    assert load_file(again).keys() == load_file(ours).keys()
    assert all(torch.equal(tensor, load_file(ours)[name]) for name, tensor in load_file(again).items())
    assert load_model(again).network.config == load_model(ours).network.config
    assert not list(tmp_path.glob("*.partial*"))


def test_imported_flows_say_that_they_draw_no_posteriors(released, tmp_path, caplog):
    """Also when they were exported and imported again; a .pt cannot say it, and export does."""
    back, again = tmp_path / "back.safetensors", tmp_path / "again.safetensors"
    for source, kind in (("sit", "base flow"), ("dmf", "flow map")):
        out = tmp_path / "out.safetensors"
        import_main([str(released(source)), "--source", source, "--output", str(out), "--num-heads=4",
                     "--encoder-depth=3"])  # fmt: skip
        export_main([str(out), "--output", str(back)])
        import_main([str(back), "--output", str(again)])
        for file in (out, again):
            with pytest.raises(CheckpointError, match=f"is a {kind}, which draws no posteriors"):
                TargetSettings(str(file), "brightness").load()
        assert "cannot say" not in caplog.text
        export_main([str(out), "--output", str(tmp_path / "back.pt")])
        assert f"back.pt cannot say that it is a {kind}" in caplog.text
        caplog.clear()


def test_exported_convention_of_time_is_kept(tmp_path, caplog):
    model = load_model(save_model(import_small(), tmp_path / "ours.safetensors"))
    with caplog.at_level(logging.WARNING):
        path = export_checkpoint(model, tmp_path / "released.safetensors")
    assert "takes t=0 for noise" in caplog.text
    assert import_checkpoint(path).network.flip_time is False
    with pytest.raises(ValueError, match=r"expected a name that ends in \.safetensors"):
        export_checkpoint(model, tmp_path / "released.bin")


def import_small():
    from mfm_lightning.models import MetaFlowMap

    return MetaFlowMap(DiT(8, 4, 3, 16, 2, 2, 1, num_classes=3, guidance_scales=()))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Hugging Face's cache in a folder of its own; the network must not be asked."""
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(file_download, "_request_wrapper", lambda *_a, **_k: pytest.fail("the network was asked"))

    def store(repo: str, file: str, source: str = "sit"):
        folder = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        path = folder / "snapshots" / ("0" * 40) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights(source), path)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs/main").write_text("0" * 40)
        return path

    return store


def test_a_repository_in_hugging_faces_cache(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = hub("nyu/sit", "sub/sit.safetensors")
    assert find_file("nyu/sit") == find_file("hf:nyu/sit") == find_file("nyu/sit/sub/sit.safetensors") == path
    check_parity(import_checkpoint("nyu/sit", "sit", **NOT_IN_SHAPES), "sit")
    hub("nyu/sit", "other.safetensors")
    with pytest.raises(ValueError, match=r"nyu/sit has 2 checkpoints.*name one, as nyu/sit/other"):
        find_file("nyu/sit")
    hub("nyu/sit", "model.safetensors")
    assert find_file("nyu/sit", revision="0" * 40).name == "model.safetensors"
    (tmp_path / "nyu").mkdir()  # a local folder of that name wins, but for hf:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at nyu/sit$"):
        find_file("nyu/sit")
    assert find_file("hf:nyu/sit").name == "model.safetensors"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("org/name", r"a checkpoint of org/name is not in Hugging Face's cache.*`hf download org/name` fetches it"),
        ("org/name/a/b.pt", r"no file at org/name/a/b.pt, and a/b.pt of org/name .*`hf download org/name a/b.pt`"),
        ("/org/name/b.pt", r"no checkpoint at /org/name/b.pt$"),
        ("folder/b.pt", r"no checkpoint at folder/b.pt$"),
        ("b.pt", r"no checkpoint at b.pt$"),
        ("a--b/c", "no checkpoint at a--b/c, which is no name of a repository either"),
    ],
)
def test_what_is_not_there_is_named(hub, tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=message):
        import_checkpoint(path)


def test_a_download_is_made_only_where_it_is_allowed(hub, tmp_path, monkeypatch):
    import huggingface_hub

    def unreachable(*_args, **_kwargs):
        raise ConnectionError("no route")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", unreachable)
    with pytest.raises(FileNotFoundError, match=r"a checkpoint of org/name is not in .* \(no route\)\. `hf download"):
        find_file("org/name", allow_download=True)
    path, asked = hub("org/name", "sub/model.pt"), []
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: ["README.md", "sub/model.pt"])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **how: asked.append((args, how)) or str(path))
    assert find_file("org/name", allow_download=True, revision="v1") == path
    assert asked == [(("org/name", "sub/model.pt"), {"revision": "v1", "local_files_only": False})]


def test_wrong_files_are_named_with_their_first_keys_and_shapes(released, tmp_path):
    path = released("mfm")
    whole = path.read_bytes()
    torch.save(weights("mfm"), old := tmp_path / "old.pt")
    for file, message in ((path, "is not a safetensors file"), (old, "not a file of plain tensors")):
        file.write_bytes(file.read_bytes()[: len(whole) // 2])
        with pytest.raises(CheckpointError, match=rf"{file.name}.*{message}"):
            import_checkpoint(file, **ARCHITECTURE)
    with pytest.raises(
        CheckpointError, match=r"mfm\.safetensors.*1 names missing \['encoder_s\.mlp\.0\.bias \(64,\)'\]"
    ):
        import_checkpoint(released("mfm", **{"dit.s_embedder.mlp.0.bias": None}), **ARCHITECTURE)
    with pytest.raises(CheckpointError, match=r"mfm\.safetensors: names missing, first x_embedder\.proj\.weight"):
        import_checkpoint(released("mfm", **{"dit.x_embedder.proj.weight": None}), **NOT_IN_SHAPES)
    wide = {**ARCHITECTURE, "num_classes": 1000}
    with pytest.raises(
        CheckpointError,
        match=r"mfm.safetensors: the table of labels has 11 rows: expected 1000 classes, and one for the null label",
    ):
        import_checkpoint(released("mfm"), **wide)
    flat = {"dit.x_embedder.proj.weight": torch.zeros(64, 16)}
    with pytest.raises(CheckpointError, match=r"x_embedder.proj.weight has shape \(64, 16\), expected 4 dimensions"):
        import_checkpoint(released("mfm", **flat), **NOT_IN_SHAPES)
    with pytest.raises(CheckpointError, match="has names of source 'dmf' or 'sit', not of 'mfm'"):
        import_checkpoint(released("sit"), "mfm", **NOT_IN_SHAPES)
    with pytest.raises(CheckpointError, match="has names of source 'mfm', not of 'sit'"):
        import_checkpoint(released("mfm"), "sit", **NOT_IN_SHAPES)


def test_arguments_beside_the_weights_do_no_harm(tmp_path):
    """As in the files that SiT's and DMF's training writes."""
    torch.save({"ema": weights("sit"), "args": argparse.Namespace(model="SiT-XL/2")}, tmp_path / "last.pt")
    check_parity(import_checkpoint(tmp_path / "last.pt", "sit", **NOT_IN_SHAPES), "sit")
