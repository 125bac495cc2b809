"""Random colours are those of torchvision's v2 transforms, from the same random numbers."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from util.data import colours
from util.data.colours import Colours


def view(height=40, width=56):
    """Smooth and noisy parts, all grey levels, flat colours."""
    steep = torch.linspace(0, 255, width).expand(3, height, width).clone()
    steep[1] = steep[1].flip(1)
    steep[:, 20:] = torch.randint(0, 256, (3, height - 20, width)).float()
    steep[:, :4] = torch.tensor([[0.0, 255.0, 7.0]]).T[:, :, None]
    steep[:, 4:8] = steep[:1, 4:8]
    return steep.to(torch.uint8)


@pytest.mark.parametrize(("blur", "solarize"), [(1.0, 0.0), (0.1, 0.2), (0.5, 0.0)])
def test_they_are_torchvision_s(blur, solarize):
    """300 draws: values at most 3 levels off after all steps, and hardly any of them at all; equally many drawn."""
    jitter = 0.4, 0.4, 0.2, 0.1
    steps = [
        v2.RandomApply([v2.ColorJitter(*jitter)], p=0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=blur),
    ]
    reference = v2.Compose([*steps, v2.RandomSolarize(128, p=solarize)] if solarize else steps)
    ours, apart = Colours(jitter, blur, solarize), []
    for seed in range(300):
        torch.manual_seed(seed)
        given = view()
        before = given.clone()
        torch.manual_seed(seed)
        expected, after = reference(given), torch.rand(1)
        torch.manual_seed(seed)
        found = ours(given)
        assert torch.rand(1) == after
        assert found.dtype == torch.uint8
        assert torch.equal(given, before)
        apart.append((found.int() - expected.int()).abs())
    apart = torch.stack(apart)
    assert apart.max() <= 3
    assert (apart > 0).float().mean() < 1e-3


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_steps_without_hue_are_exact(name):
    for factor in (0.6, 0.93, 1.0, 1.4):
        given = view()
        expected = getattr(functional, f"adjust_{name}")(given, factor)
        assert torch.equal(getattr(colours, name)(given.float(), factor), expected.float())


@pytest.mark.parametrize("shift", [-0.1, 0.0, 0.03, 1 / 6])
def test_hue_is_at_most_one_level_off(shift):
    torch.manual_seed(0)
    given = view(60, 300)
    apart = (colours.hue(given.float(), shift) - functional.adjust_hue(given, shift)).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 1e-3


@pytest.mark.parametrize("deviation", [0.1, 0.5, 1.3, 2.0])
def test_blur_is_at_most_one_level_off(deviation):
    torch.manual_seed(0)
    given = view()
    expected = functional.gaussian_blur(given, [13, 13], deviation)
    apart = (colours.blur(given.float(), deviation).round() - expected).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 1e-3
