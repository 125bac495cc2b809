"""Which number format runs where: autocast for the network, true fp32 for what ranks tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

# Backends whose fp32 products may silently be computed in TF32 or bf16.
_FP32_BACKENDS = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,
    torch.backends.mkldnn.matmul,
    torch.backends.mkldnn.conv,
)

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}


def no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Return a context without autocast; the meta device, where shapes and costs are counted, has none."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else contextlib.nullcontext()


@contextlib.contextmanager
def full_fp32(device_type: str) -> Iterator[None]:
    """Run fp32 products as real fp32: autocast off, TF32 and bf16 substitutes off; settings are restored.

    Salience needs it: raw inner products reach 2000, where bf16 resolves steps of 8.
    """
    before = [backend.fp32_precision for backend in _FP32_BACKENDS]
    try:
        for backend in _FP32_BACKENDS:
            backend.fp32_precision = "ieee"
        with no_autocast(device_type):
            yield
    finally:
        for backend, setting in zip(_FP32_BACKENDS, before, strict=True):
            backend.fp32_precision = setting


def resolve_amp(amp: str | None, device: torch.device) -> str:
    """Return the `--amp` setting that will be used: bf16 where the GPU has it, else fp16; `none` on a CPU."""
    if amp is not None:
        return amp
    if device.type != "cuda":
        return "none"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(amp: str, device: torch.device) -> torch.autocast:
    """Return an autocast context for `--amp` (`bf16`, `fp16` or `none`) on `device`."""
    dtype = AMP_DTYPES[amp]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def grad_scaler(amp: str, device: torch.device) -> torch.amp.GradScaler:
    """Return the loss scaler that fp16 needs; a pass-through for every other format."""
    return torch.amp.GradScaler(device.type, enabled=amp == "fp16")
