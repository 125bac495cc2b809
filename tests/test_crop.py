"""The crop of pre-training is torchvision's, exactly or nearly."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as tv

from util.data import crop, decode


def photographs(count):
    """Smooth pictures of many shapes, as JPEGs."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        width, height = rng.integers(20, 160, 2)
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        yield buffer.getvalue()


def test_exact_crops_are_torchvision_s_to_the_bit_and_fast_ones_near():
    """1,000 pictures with the same random numbers; the fast crop at most 6 of 255 levels off."""
    size, scale = (32, 32), (0.2, 1.0)
    reference = tv.Compose(
        [
            tv.RandomResizedCrop(size, scale=scale, interpolation=tv.InterpolationMode.BICUBIC),
            tv.RandomHorizontalFlip(),
            tv.PILToTensor(),
        ]
    )
    exact, fast = crop.PictureCrop(size, scale, 0.5), crop.PixelCrop(size, scale, 0.5)
    apart = []
    for number, data in enumerate(photographs(1000)):
        torch.manual_seed(number)
        expected = reference(Image.open(io.BytesIO(data)).convert("RGB"))
        torch.manual_seed(number)
        pixels, flip, _ = exact(decode.to_picture(data, "RGB"))
        found = pixels.permute(2, 0, 1)
        assert torch.equal(found.flip(2) if flip else found, expected), number
        torch.manual_seed(number)
        near, near_flip, _ = fast(decode.to_pixels(data, 3))
        assert near_flip == flip
        apart.append((near.int() - pixels.int()).abs())
    apart = torch.stack(apart).float()
    assert apart.max() <= 6
    assert apart.mean() < 0.1


@pytest.mark.parametrize("shape", [(500, 375), (40, 400), (400, 40), (1, 1), (1, 300), (3, 2)])
def test_the_box_is_torchvision_s(shape):
    for seed in range(200):
        torch.manual_seed(seed)
        expected = tv.RandomResizedCrop.get_params(torch.empty(3, shape[1], shape[0]), (0.2, 1.0), (3 / 4, 4 / 3))
        after = torch.rand(1)
        torch.manual_seed(seed)
        assert crop.draw_box(*shape, (0.2, 1.0)) == expected
        assert torch.rand(1) == after
