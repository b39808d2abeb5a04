"""What image models do to a picture, against the PIL code that it replaces."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms.functional import to_tensor

from mfm_rewards.preprocessing import CLIP_STD, Preprocessing
from tests.tiny_rewards import longest_edge_padded


@pytest.mark.parametrize("size", [224, 97])
def test_preprocessing_is_that_of_pil(photos, size):
    """Within 2 grey levels of 255 anywhere, half a level on average: PIL rounds to 8 bits after each pass."""
    from ImageReward.ImageReward import _transform
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    originals = {
        "crop": lambda image: _transform(size)(image),  # ImageReward's, and openai/CLIP's
        "crop_floor": lambda image: processor(images=image, return_tensors="pt").pixel_values[0],
    }
    std = torch.tensor(CLIP_STD)[:, None, None]
    for photo in photos:
        for fit, original in originals.items():
            ours = Preprocessing(size, fit)(to_tensor(photo)[None])[0]
            levels = ((ours - original(photo)) * std * 255).abs()
            assert levels.max() < 2, fit
            assert levels.mean() < 0.5, fit
        ours = Preprocessing(size, "pad", mean=(0.0,) * 3, std=(1.0,) * 3)(to_tensor(photo)[None])[0]
        levels = (ours - longest_edge_padded(photo, size)).abs() * 255
        assert levels.max() < 2
        assert levels.mean() < 0.5


def test_preprocessing_takes_grey_images_and_batches_and_refuses_others(photos):
    grey = torch.rand(2, 1, 30, 50)
    torch.testing.assert_close(Preprocessing(24)(grey), Preprocessing(24)(grey.expand(-1, 3, -1, -1)))
    for fit in ("crop", "pad"):
        x = torch.rand(2, 3, 9, 14, dtype=torch.float64).mul(0.8).add(0.1).requires_grad_()
        assert torch.autograd.gradcheck(Preprocessing(8, fit), x)
    with pytest.raises(ValueError, match=r"images of shape \(2, 4, 8, 8\): expected \(B, 3, H, W\)"):
        Preprocessing(24)(torch.rand(2, 4, 8, 8))
    with pytest.raises(ValueError, match="unknown fit 'stretch'"):
        Preprocessing(24, "stretch")
