"""Pictures of pairs: none is left out, whatever their number."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from mfm_lightning.utils.figures import pairs_in_rows


@pytest.mark.parametrize("number", [1, 3, 4, 5, 9])
def test_all_pairs_are_in_the_picture(tmp_path, number):
    """Black images on a white page, counted as connected regions; captions left out, which are black, too."""
    pairs_in_rows(torch.zeros(number, 2, 3, 8, 8), [["", ""]] * number, tmp_path / "pairs.png", "")
    page = np.asarray(Image.open(tmp_path / "pairs.png").convert("L"))
    _, found = ndimage.label(page < 50)
    assert found == 2 * number
