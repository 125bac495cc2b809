"""Where chosen tokens of a batch lie: in the images, and in sequences that begin with a class token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from util.packing import PackedLayout


@dataclass(frozen=True)
class Sequences:
    """Where the chosen tokens of N images lie, in the images and in one sequence for each image.

    A sequence is the class token and the chosen tokens of one image: the kept ones for the encoder, or those that the
    decoder sees. T is their total.

    Attributes:
        patches: (T,) places in the flattened (N, L).
        rows: (T,) places in the packed (T + N) sequences.
        class_rows: (N,) places of the class tokens there.
        slots: (T + N,) place of every row in the flattened (N, L + 1), the class token first.
        layout: of the sequences; None where all are of one length.
    """

    patches: torch.Tensor
    rows: torch.Tensor
    class_rows: torch.Tensor
    slots: torch.Tensor
    layout: PackedLayout | None

    @staticmethod
    def locate(
        ids: torch.Tensor, counts: torch.Tensor, num_tokens: int, lengths: tuple[int, ...] | None = None
    ) -> Sequences:
        """Lay out the chosen positions `ids`, out of `num_tokens`.

        Args:
            ids: (N, K), or packed (T,) with the `lengths` of the images.
            counts: (N,) int64, chosen tokens of each image.
            num_tokens: L.
            lengths: `counts` on the host; None where ids is (N, K).
        """
        num_images, device = len(counts), ids.device
        image = torch.arange(num_images, device=device)  # (N,)
        if lengths is None:
            layout, of_image = None, image[:, None].expand_as(ids).flatten()
        else:
            layout = PackedLayout.from_lengths(tuple(k + 1 for k in lengths), device)
            of_image = torch.repeat_interleave(image, counts, output_size=ids.numel())  # (T,)
        patches = of_image * num_tokens + ids.flatten()
        rows = torch.arange(len(patches), device=device) + of_image + 1
        class_rows = counts.cumsum(0) - counts + image
        slots = torch.empty(len(patches) + num_images, dtype=torch.int64, device=device)
        slots.index_copy_(0, rows, patches + of_image + 1)
        slots.index_copy_(0, class_rows, image * (num_tokens + 1))
        return Sequences(patches, rows, class_rows, slots, layout)

    def rows_of(self, others: Sequences, num_tokens: int) -> torch.Tensor:
        """Return where the rows of `others`, whose tokens are all among these, lie in these sequences."""
        row = torch.arange(len(self.slots), device=self.slots.device)
        places = torch.empty(len(self.class_rows) * (num_tokens + 1), dtype=torch.int64, device=row.device)
        return places.index_copy_(0, self.slots, row)[others.slots]
