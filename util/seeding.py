"""Random states as pure functions of what they belong to, so that nothing depends on history or process layout."""

from __future__ import annotations

import contextlib
import hashlib
import random
import struct
from collections.abc import Iterator

import numpy as np
import torch

# Streams: the same numbers in another role must not give the same random state.
ORDER, SAMPLE, STEP, MODEL, NOISE, DECODE, DRAW, SECOND_NOISE, RATIO, GATE = range(10)


def derive(seed: int, *keys: int) -> int:
    """Return a 63-bit seed for (seed, *keys), which are all below 2^63; near-by keys give unrelated seeds."""
    packed = struct.pack(f"<{len(keys) + 1}q", seed, *keys)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch (every device). No host synchronisation."""
    _seed_host(seed)
    torch.manual_seed(seed)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Set the random state of one optimizer step on one rank: masking noise, drop path, mixup."""
    seed_all(derive(seed, STEP, step, rank))


def step_noise(
    seed: int, step: int, places: range, step_size: int, length: int, device: torch.device, stream: int = NOISE
) -> torch.Tensor:
    """Draw U[0, 1) for each token of the samples `places` of a step of `step_size` samples: (len(places), length).

    A sample's noise does not depend on how the step is shared out over processes and micro-batches.
    """
    generator = torch.Generator(device).manual_seed(derive(seed, stream, step))
    noise = torch.rand(step_size, length, generator=generator, device=device)
    return noise[places.start : places.stop : places.step]


def step_draw(seed: int, step: int) -> float:
    """Draw one number from U[0, 1) for all samples of a step."""
    return random.Random(derive(seed, DRAW, step)).random()


@contextlib.contextmanager
def sample_state(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Set the random state for the augmentation of sample `index` in `epoch`; restore the caller's after the block."""
    if torch.utils.data.get_worker_info() is not None:  # nobody else draws in a loader's worker
        _seed_host(derive(seed, SAMPLE, epoch, index))
        yield
        return
    before = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    _seed_host(derive(seed, SAMPLE, epoch, index))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.random.set_rng_state(before[2])


def _seed_host(value: int) -> None:
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    torch.default_generator.manual_seed(value)


def permutation(seed: int, epoch: int, length: int) -> list[int]:
    """Return the order of the samples in `epoch`: a permutation of 0..length-1, the same on every rank."""
    generator = torch.Generator().manual_seed(derive(seed, ORDER, epoch))
    return torch.randperm(length, generator=generator).tolist()
