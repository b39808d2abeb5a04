"""Pictures of pairs: none is left out, whatever their number."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from mfm_lightning.utils.figures import image_grid, pairs_in_rows


@pytest.mark.parametrize("number", [1, 3, 4, 5, 9])
def test_all_pairs_are_in_the_picture(tmp_path, number):
    """Black images on a white page, counted as connected regions; captions left out, which are black, too."""
    pairs_in_rows(torch.zeros(number, 2, 3, 8, 8), [["", ""]] * number, tmp_path / "pairs.png", "")
    page = np.asarray(Image.open(tmp_path / "pairs.png").convert("L"))
    _, found = ndimage.label(page < 50)
    assert found == 2 * number


@pytest.mark.parametrize(("height", "width"), [(16, 8), (8, 16), (8, 8)])
def test_images_keep_their_ratio_and_order(tmp_path, height, width):
    """Six images of rising brightness, as connected regions of one value, in inches of 130 pixels."""
    values = torch.linspace(0.1, 0.6, 6)
    image_grid(values.view(2, 3, 1, 1, 1).expand(2, 3, 3, height, width), tmp_path / "grid.png", "", size=1.5)
    page = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    marked, found = ndimage.label(page < 200)
    assert found == 6
    boxes = sorted(ndimage.find_objects(marked), key=lambda box: (round(box[0].start, -1), box[1].start))
    for value, (rows, columns) in zip(values.tolist(), boxes, strict=True):
        size = np.array([rows.stop - rows.start, columns.stop - columns.start]) / (130 * (1.5 - 0.06))
        assert size == pytest.approx(np.array([height, width]) / max(height, width), abs=0.02)
        middle = page[(rows.start + rows.stop) // 2, (columns.start + columns.stop) // 2]
        assert middle == pytest.approx(255 * value, abs=2)


@pytest.mark.parametrize("lines", [1, 2, 3])
def test_a_title_of_some_lines_stands_above_the_captions(tmp_path, lines):
    """Bands of ink from the top: each line of the title, the captions, the images."""
    title = "\n".join(["XX"] * lines)
    image_grid(torch.zeros(1, 2, 1, 8, 8), tmp_path / "grid.png", title, captions=[["XX", "XX"]], size=1.5)
    ink = (np.asarray(Image.open(tmp_path / "grid.png").convert("L")) < 200).any(axis=1)
    _, bands = ndimage.label(ink)
    assert bands == lines + 2


def test_a_title_that_is_wider_than_the_picture_is_broken(tmp_path):
    """As of one pair of images: no letter touches the edges, where it would be cut off."""
    title = "base flow (upper of each pair) and steered ode from the same noise (lower)\nmean reward 0.1 to 0.3"
    image_grid(torch.zeros(1, 2, 1, 8, 8), tmp_path / "grid.png", title, captions=[["XX", "XX"]], size=1.5)
    page = np.asarray(Image.open(tmp_path / "grid.png").convert("L")) < 200
    assert not page[:, :5].any()
    assert not page[:, -5:].any()
