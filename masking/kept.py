"""Where the kept tokens of a batch lie: for the encoder, and for the decoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from util.packing import PackedLayout


@dataclass(frozen=True)
class KeptTokens:
    """Where the kept tokens of N images lie: in the images, in the encoder's sequences, in the decoder's.

    An encoder's sequence is the class token and the kept tokens of one image; a decoder's is the class token and all
    L tokens. T = sum(num_keep).

    Attributes:
        patches: (T,) places in the flattened (N, L).
        rows: (T,) places in the packed (T + N) encoder sequences.
        class_rows: (N,) places of the class tokens there.
        slots: (T + N,) place of every encoder row in the flattened (N, L + 1).
        layout: of the encoder's sequences; None where all are of one length.
    """

    patches: torch.Tensor
    rows: torch.Tensor
    class_rows: torch.Tensor
    slots: torch.Tensor
    layout: PackedLayout | None

    @staticmethod
    def locate(
        ids_keep: torch.Tensor, num_keep: torch.Tensor, num_tokens: int, keep_lengths: tuple[int, ...] | None
    ) -> KeptTokens:
        """From the kept positions (N, K), or packed (T,) with the `keep_lengths` of the images, out of `num_tokens`."""
        num_images, device = len(num_keep), ids_keep.device
        image = torch.arange(num_images, device=device)  # (N,)
        if keep_lengths is None:
            layout, of_image = None, image[:, None].expand_as(ids_keep).flatten()
        else:
            layout = PackedLayout.from_lengths(tuple(k + 1 for k in keep_lengths), device)
            of_image = torch.repeat_interleave(image, num_keep, output_size=ids_keep.numel())  # (T,)
        patches = of_image * num_tokens + ids_keep.flatten()
        rows = torch.arange(len(patches), device=device) + of_image + 1
        class_rows = num_keep.cumsum(0) - num_keep + image
        slots = torch.empty(len(patches) + num_images, dtype=torch.int64, device=device)
        slots.index_copy_(0, rows, patches + of_image + 1)
        slots.index_copy_(0, class_rows, image * (num_tokens + 1))
        return KeptTokens(patches, rows, class_rows, slots, layout)
