"""Large and small views of one image, each cropped, flipped and coloured by itself (DINO, iBOT)."""

from __future__ import annotations

import torch

from util.data.colours import Colours
from util.data.crop import PixelCrop


class MultiCrop:
    """Two global views and any number of local ones; the image is decoded once.

    Args:
        size: height and width of a global view in pixels.
        scale: range of a global view's area over the image's.
        hflip: probability of a view's flip.
        local_size: height and width of a local view.
        local_scale: range of a local view's area.
        local_number: number of local views.
    """

    takes_pixels = True

    def __init__(
        self,
        size: tuple[int, int],
        scale: tuple[float, float],
        hflip: float,
        local_size: tuple[int, int],
        local_scale: tuple[float, float],
        local_number: int,
    ):
        self.globals = PixelCrop(size, scale, hflip)
        self.locals = PixelCrop(local_size, local_scale, hflip)
        self.number = local_number
        # The last steps of the first global view, of the second, and of the local ones.
        jitter = 0.4, 0.4, 0.2, 0.1
        self.colours = Colours(jitter, blur=1.0), Colours(jitter, blur=0.1, solarize=0.2), Colours(jitter, blur=0.5)

    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """pixels (H, W, 3) -> global views (2, 3, h, w) and, if there are any, local ones (n, 3, h', w'), `uint8`."""
        large = torch.stack([self._view(pixels, self.globals, self.colours[number]) for number in (0, 1)])
        small = [self._view(pixels, self.locals, self.colours[2]) for _ in range(self.number)]
        return (large, torch.stack(small)) if small else (large,)

    @staticmethod
    def _view(pixels: torch.Tensor, crop: PixelCrop, colours: Colours) -> torch.Tensor:
        view, flip, _ = crop(pixels)
        view = view.permute(2, 0, 1)
        return colours(view.flip(2) if flip else view)
