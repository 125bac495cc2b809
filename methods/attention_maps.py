"""Attention maps of all training images by the model itself, for strategies that need `maps`: AM and AMT."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

import masking
from masking.mask import on_device
from util import files, precision
from util.data.crop import Squash
from util.distributed import world
from util.training.whole_set import WholeSet


class AttentionMaps:
    """A file with a map for each training image, beside the checkpoint, made anew every few epochs.

    It is made after epoch e (0-based) where e > 0 is a multiple of `every` and not the last, and used until the next
    one is. So the file that an epoch needs is a function of its number, and a run that continues finds it. Before the
    first one all maps are 1.

    Args:
        folders: where files are looked for; new ones are written to the first.
        every: epochs between two files.
        epochs: length of the schedule.
        grid: rows and columns of a map.
    """

    def __init__(self, folders: list[Path], every: int, epochs: int, grid: tuple[int, int]):
        self.folders, self.every, self.epochs, self.grid = folders, every, epochs, grid
        self._open: tuple[int | None, np.ndarray | None] = (None, None)

    def due(self, epoch: int) -> bool:
        """Return whether the file is made after `epoch`."""
        return epoch > 0 and epoch % self.every == 0 and epoch + 1 < self.epochs

    def made_after(self, epoch: int) -> int | None:
        """Return the epoch after which the file was made that `epoch` uses; None before the first, and at the end."""
        last = (epoch - 1) // self.every * self.every
        return last if last > 0 and epoch < self.epochs else None

    def of(self, index: torch.Tensor, epoch: int, device: torch.device) -> torch.Tensor:
        """Return the maps of the images `index` (N,), as `epoch` uses them: (N, rows, columns) fp32."""
        made_after = self.made_after(epoch)
        if made_after is None:
            return torch.ones(len(index), *self.grid, device=device)
        if self._open[0] != made_after:
            self._open = made_after, self.find(made_after)
        return on_device(self._open[1][index.numpy()].astype(np.float32), torch.float32, device)

    def find(self, made_after: int, num_images: int | None = None) -> np.ndarray:
        """Open the file made after an epoch, memory-mapped. ValueError: it is missing or of other images."""
        name = _name(made_after)
        path = next((folder / name for folder in self.folders if (folder / name).is_file()), None)
        if path is None:
            raise ValueError(
                f"{self.folders[0] / name}: there is no such file, but the masks need the attention maps made after "
                f"epoch {made_after}; copy it from the folder of the checkpoint, or begin a new run with --finetune (a "
                f"schedule that ends after epoch {made_after} does not make them)"
            )
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path}: is no file of attention maps ({error}); copy it again") from error
        expected = (len(found) if num_images is None else num_images, *self.grid)
        if found.shape != expected or found.dtype != np.float16:
            raise ValueError(
                f"{path}: holds maps {found.shape} of {found.dtype}, not {expected} of float16; copy it again from the "
                "folder of the checkpoint"
            )
        return found

    def make(self, model: nn.Module, normalize: nn.Module, images: WholeSet, epoch: int, amp: str) -> None:
        """Look at all images, unmasked and squashed to the model's size, and write the file that follows `epoch`."""
        part = self.folders[0] / f"{_name(epoch)}.part{world.rank()}"
        mine = [np.empty((0, *self.grid), np.float16)]
        training, device = model.training, normalize.shift.device
        model.eval()
        for pixels in images.in_order(Squash(model.patch_embed.img_size), f"attention maps after epoch {epoch}"):
            with precision.autocast(amp, device), torch.no_grad():
                attention = model.class_attention(normalize(pixels.to(device, non_blocking=True)))
            maps = masking.attention_map(attention.float()).view(-1, *self.grid)
            mine.append(maps.half().cpu().numpy())
        model.train(training)
        images.together(self._try(self._write, part, np.concatenate(mine)))
        images.together(self._try(self._join, epoch, len(images)) if world.is_main() else "")

    def _try(self, write: Callable[..., None], *arguments) -> str:
        """Call `write`; return why it failed, or nothing."""
        try:
            write(*arguments)
        except OSError as error:
            return (
                f"--output_dir {self.folders[0]}: the attention maps could not be written ({error}); make room or mend "
                "the disk, which several machines must share, and run the same command again"
            )
        return ""

    def _write(self, path: Path, maps: np.ndarray) -> None:
        with files.replacing(path) as file:
            np.save(file, maps, allow_pickle=False)

    def _join(self, epoch: int, num_images: int) -> None:
        """Put the parts of all processes together; forget files that no checkpoint can need any more."""
        folder = self.folders[0]
        parts = [folder / f"{_name(epoch)}.part{rank}" for rank in range(world.world_size())]
        with files.replacing(folder / _name(epoch), durable=True) as file:
            header = {"descr": "<f2", "fortran_order": False, "shape": (num_images, *self.grid)}
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(np.load(part, mmap_mode="r").tobytes())
        for part in parts:
            part.unlink()
        for path in folder.glob(_name("*")):
            number = re.fullmatch(_name(r"(\d+)"), path.name)
            if number and int(number[1]) < epoch - self.every:  # the last checkpoint may be of before this epoch's end
                path.unlink(missing_ok=True)


def _name(epoch: int | str) -> str:
    return f"attention_maps-{epoch}.npy"
