"""Random colours of one view: torchvision's v2 transforms from the same random numbers, several times faster."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

_GREY = (0.2989, 0.587, 0.114)  # weights of red, green and blue
_HUES = torch.tensor([0.0, 2.0, 4.0]).view(3, 1, 1)  # of red, green and blue, on a circle of 6


class Colours:
    """Jitter with probability 0.8, then grey with 0.2, blur and solarisation: the last steps of DINO, iBOT and CMAE.

    The steps are those of `v2.ColorJitter`, `RandomGrayscale`, `GaussianBlur` (13 pixels, deviation 0.1 to 2) and
    `RandomSolarize`, drawn alike. Hue and blur round differently, each by at most 1 level: after all steps
    fewer than one value in 1,000 differs, by at most 3 levels.

    Args:
        jitter: of brightness, contrast, saturation and hue, as for `v2.ColorJitter`.
        blur: probability of the blur.
        solarize: probability of the solarisation.
    """

    def __init__(self, jitter: tuple[float, float, float, float], blur: float, solarize: float = 0.0):
        self.jitter, self.blur, self.solarize = jitter, blur, solarize

    def __call__(self, view: torch.Tensor) -> torch.Tensor:
        """(3, h, w) `uint8` -> the same."""
        x = view.to(torch.float32, memory_format=torch.contiguous_format)  # whole numbers after every step
        if _chance(0.8):
            order = torch.randperm(4).tolist()
            factors = [_uniform(middle - by, middle + by) for middle, by in zip((1, 1, 1, 0), self.jitter, strict=True)]
            for step in order:
                x = _STEPS[step](x, factors[step])
        if _chance(0.2):
            x = _grey(x)[None]
        if _chance(self.blur):
            x = blur(x, _uniform(0.1, 2.0)).round_()
        changed = x.to(torch.uint8).expand_as(view)
        if self.solarize and _chance(self.solarize):
            changed = torch.where(changed >= 128, ~changed, changed)
        return changed


def brightness(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Multiply the values of x (3, h, w)."""
    return x.mul(factor).clamp_(max=255).floor_()


def contrast(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Blend x (3, h, w) with the mean of its grey."""
    return x.mul(factor).add_(_grey(x).mean(), alpha=1 - factor).clamp_(0, 255).floor_()


def saturation(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Blend x (3, h, w) with its grey."""
    return x.mul(factor).add_(_grey(x), alpha=1 - factor).clamp_(0, 255).floor_()


def hue(x: torch.Tensor, shift: float) -> torch.Tensor:
    """Turn the hues of x (3, h, w) by `shift`, -1/6 to 1/6 of the circle; the largest and smallest value stay.

    A channel's part of the range between them is 1 up to a distance of 1 from its own hue, on the circle of 6, and 0
    from a distance of 2 on.
    """
    red, green, blue = x
    high, low = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    span = high - low
    not_red, not_green = (high - red).clamp_(max=1), (high - green).clamp_(max=1)  # 0 or 1: values are whole
    other = torch.lerp((blue - red).add_(span, alpha=2), (red - green).add_(span, alpha=4), not_green)
    hues = torch.lerp(green - blue, other, not_red).div_(span.clamp(min=1)).add_(6 * shift)  # (h, w)
    part = (hues - _HUES).abs_().sub_(3).abs_().sub_(1).clamp_(0, 1)  # 2 - distance, where distance = 3 - ||.| - 3|
    scale = 255.999 / 255  # as v2 makes whole numbers of 0..1
    return part.mul_(span.mul_(scale)).add_(low.mul_(scale)).floor_()


def blur(x: torch.Tensor, deviation: float) -> torch.Tensor:
    """Blur x (c, h, w) by a Gaussian over at most 13 x 13 pixels, reflected at the borders."""
    radius = min(6, math.ceil(6 * deviation))
    weights = torch.arange(-radius, radius + 1).div(deviation).square().div(-2).softmax(dim=0).tolist()
    padded = F.pad(x, [radius] * 4, mode="reflect")
    return _weighted(_weighted(padded, 2, weights), 1, weights)


def _weighted(x: torch.Tensor, dim: int, weights: list[float]) -> torch.Tensor:
    """Sum windows of x along `dim` with symmetric weights; faster than a convolution of few channels."""
    radius, length = len(weights) // 2, x.shape[dim] - len(weights) + 1
    total = x.narrow(dim, radius, length) * weights[radius]
    for step in range(1, radius + 1):
        pair = x.narrow(dim, radius - step, length) + x.narrow(dim, radius + step, length)
        total.add_(pair, alpha=weights[radius + step])
    return total


def _grey(x: torch.Tensor) -> torch.Tensor:
    """Return the grey (h, w) of x (3, h, w)."""
    red, green, blue = x
    return red.mul(_GREY[0]).add_(green, alpha=_GREY[1]).add_(blue, alpha=_GREY[2]).floor_()


def _chance(probability: float) -> bool:
    return torch.rand(1).item() < probability


def _uniform(low: float, high: float) -> float:
    return torch.empty(1).uniform_(low, high).item()


_STEPS: tuple[Callable[[torch.Tensor, float], torch.Tensor], ...] = (brightness, contrast, saturation, hue)
