"""The memory plan of adapters on text-to-image flows against what real steps allocate."""

import pytest
import torch
import yaml

from mfm_lightning.alignment import FlowMapPosterior, GlassPosterior
from mfm_lightning.backbones import FlowAdapter, load_flow
from mfm_lightning.commands.adapter_planning import plan_finetuning, plan_pretraining
from mfm_lightning.commands.main import run
from mfm_lightning.commands.planning import Allocations
from mfm_lightning.conditions import Conditions
from mfm_lightning.modules import MFMPretraining, PromptFinetuning
from mfm_lightning.networks.files import save_network
from mfm_lightning.objectives import Objective, PairSampler, WeightedTerm
from tests.backbones import encoders, tiny
from tests.backbones.fast import frozen  # noqa: F401


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planned")
    tiny.sd3(**encoders.of_sd3(folder / "words")).save_pretrained(folder / "sd3")
    return folder / "sd3"


def of_step(modules, step):
    with Allocations(torch.nn.ModuleList(modules)) as counted:
        step().backward()
    return counted.peak


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_step_of_a_meta_flow_map(sd3, guidance):
    objective = Objective(
        [WeightedTerm("distilled_diagonal"), WeightedTerm("semigroup")],
        pairs=PairSampler(class_dropout=0.0, guidance_scale=guidance),
    )
    settings = {"name": str(sd3), "image_size": 16, "rank": 3, "guidance_scales": [3.0], "torch_dtype": "float32"}
    plan = plan_pretraining(settings, objective, 5)
    network = FlowAdapter(**settings)
    module = MFMPretraining(network, objective)
    x1, given = torch.randn(5, *network.state_shape), network.embed(Conditions(prompts=["a red cat"] * 5))
    _ = network.null_conditions, module.teacher.model.network.null_conditions
    peak = of_step([network.flow, network], lambda: module.losses(x1, given, False)["loss"])
    assert plan.trained == sum(p.numel() for p in network.parameters())
    assert plan.weights["transformer"] == sum(
        p.nbytes for n, p in network.flow.transformer.named_parameters() if ".lora_" not in n
    ) + sum(b.nbytes for b in network.flow.transformer.buffers())
    assert plan.peak == pytest.approx(peak, rel=0.1)


def test_a_step_of_fine_tuning(sd3, tmp_path):
    mfm = str(save_network(FlowAdapter(str(sd3), rank=64, image_size=16), tmp_path / "mfm.safetensors"))
    settings = {"name": str(sd3), "image_size": 16, "torch_dtype": "float32", "max_rows": 8}
    plan = plan_finetuning(settings, {"rank": 3}, True, FlowMapPosterior(2), "reward", 2, 1.0, 4)
    posterior = FlowMapPosterior(2)
    module = PromptFinetuning(
        load_flow(**settings), "brightness", mfm, guidance=1.0, rank=3, num_draws=2, posterior=posterior
    )
    x1, given = torch.randn(4, *module.state_shape), Conditions(prompts=["a red cat"] * 4)
    module.embedded(given, x1.device)
    peak = of_step([module.flow, module.policy], lambda: module.losses(x1, given, False)["loss"])
    assert plan.trained == sum(p.numel() for p in module.policy.parameters())
    assert plan.peak == pytest.approx(peak, rel=0.1)
    with pytest.raises(ValueError, match="mfm plan knows draws by a Meta Flow Map, not those of GlassPosterior"):
        plan_finetuning(settings, {"rank": 3}, False, GlassPosterior(2), "reward", 2, 1.0, 4)


def test_a_config_is_planned_without_weights(tmp_path, capsys):
    """Of published sizes, smaller images; the table's sum is that of its rows."""
    run(["plan", "--config", "text_to_image/sana/mfm", "--image-size", "256", "--batch-size", "1"])
    text = capsys.readouterr().out
    assert "57.71 M trained parameters; images of 256 x 256, 1 at once" in text
    cells = [line.split("│")[1:3] for line in text.splitlines() if line.count("│") == 3]
    numbers = {name.strip(): float(size.split()[0]) for name, size in cells}
    assert numbers["transformer, frozen"] == pytest.approx(3.21, abs=0.01)
    assert numbers.pop("sum") == pytest.approx(sum(numbers.values()), abs=0.03)
    mine = {"model": {"class_path": "mfm_lightning.modules.PromptFinetuning"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mine))
    with pytest.raises(ValueError, match=r"mine.yaml: the data have no batch_size: give --batch_size"):
        run(["plan", "--config", str(tmp_path / "mine.yaml")])
    with pytest.raises(ValueError, match=r"mine.yaml: the flow has no name"):
        run(["plan", "--config", str(tmp_path / "mine.yaml"), "--batch-size", "2"])
