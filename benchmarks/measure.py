"""FLOPs of a training step, the device's peak, and the memory a step needs."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.timing import wait_for_device
from models_mae import MaskedAutoencoderViT


def training_flops(
    model: MaskedAutoencoderViT, keep_lengths: list[int], decode_lengths: list[int] | None = None
) -> float:
    """Count the FLOPs of forward and backward, three times the forward pass.

    Args:
        model: whose step it is.
        keep_lengths: kept patches of each image.
        decode_lengths: patches of each image that pass through the decoder; all if None.

    These are the model's matrix products (a multiplication and an addition are two), every patch embedded once:
    neither salience, nor normalisation, nor what is computed again.
    """
    num_images, num_tokens = len(keep_lengths), model.num_patches
    patch = model.patch_embed.proj
    width, decoder_width = patch.out_channels, model.decoder_embed.out_features
    pixels = patch.weight[0].numel()
    lengths = [keep + 1 for keep in keep_lengths]
    total = num_images * num_tokens * pixels * width
    total += sum(_block_products(model.blocks, width, length) for length in lengths)
    total += sum(lengths) * width * decoder_width
    decoded = [number + 1 for number in decode_lengths or [num_tokens] * num_images]
    total += sum(_block_products(model.decoder_blocks, decoder_width, length) for length in decoded)
    total += sum(decoded) * decoder_width * pixels
    return 3 * 2 * total


def _block_products(blocks: nn.ModuleList, width: int, length: int) -> int:
    linear = sum(m.in_features * m.out_features for m in blocks[0].modules() if isinstance(m, nn.Linear))
    return len(blocks) * (length * linear + 2 * length * length * width)


def matmul_peak(
    device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter, rounds: int = 20
) -> float:
    """Return the FLOP/s of a large square matrix product, the best of `rounds`."""
    size = 8192 if device.type == "cuda" else 1536
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out, best = torch.empty_like(left), float("inf")
    for _ in range(rounds):
        wait_for_device()
        start = clock()
        torch.matmul(left, right, out=out)
        wait_for_device()
        best = min(best, clock() - start)
    return 2 * size**3 / best


def peak_memory(step: Callable[[], object], tensors: list[torch.Tensor]) -> float:
    """Return the bytes that `step` needs: `tensors` that it keeps, and the most it allocates on top while it runs."""
    kept = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if tensors[0].is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return kept + torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from the present size
    before = _status("VmRSS")
    step()
    return kept + _status("VmHWM") - before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return parameters, buffers and the optimizer's state."""
    state = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    return [*model.parameters(), *model.buffers(), *state]
