"""What tests of `mfm fid` need."""

import io

import pytest
import torch

from tests.inputs.pictures import mfm


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """Random weights of torch-fidelity's Inception, in a file."""
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Fresh(extractor.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_args, **_kwargs):
            pass

    torch.save({}, nothing := io.BytesIO())
    nothing.seek(0)
    torch.manual_seed(0)
    network = Fresh("inception-v3-compat", ["64"], feature_extractor_weights_path=nothing)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def fid(inception, tmp_path):
    """`mfm fid` of 64 features, with a reference where one is given."""

    def measure(samples, reference=None, *more):
        against = [] if reference is None else ["--reference", reference]
        return mfm(
            "fid", "--samples", samples, *against, "--weights", inception, "--num-features", 64, "--splits", 2,
            "--device", "cpu", "--cache", tmp_path / "cache", *more,
        )  # fmt: skip

    return measure
