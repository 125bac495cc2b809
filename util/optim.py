"""Optimizers and parameter groups of the three recipes."""

from __future__ import annotations

from collections.abc import Collection

import torch
from timm.optim import param_groups_layer_decay
from torch import nn


def pretrain_adamw(
    groups: list[dict], device: torch.device, betas: tuple[float, float] = (0.9, 0.95)
) -> torch.optim.AdamW:
    """Build AdamW of pre-training over parameter groups; the `betas` are MAE's by default."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=device.type in ("cuda", "cpu"))


def finetune_adamw(
    model: nn.Module, weight_decay: float, layer_decay: float, device: torch.device
) -> torch.optim.AdamW:
    """Build AdamW of fine-tuning: betas (0.9, 0.999), learning rates falling by `layer_decay` with depth."""
    groups = layer_decay_groups(model, weight_decay, layer_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=device.type in ("cuda", "cpu"))


def layer_decay_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict]:
    """Return timm's groups with `lr_scale` = decay^(depth + 1 - layer), the final norm on the head's layer as in MAE.

    Layer 0 is the embedding, layer i + 1 is block i, layer depth + 1 is everything after the blocks.
    """
    groups = param_groups_layer_decay(
        model, weight_decay, no_weight_decay_list=model.no_weight_decay(), layer_decay=layer_decay
    )
    # With a class token timm counts `norm` to the last block; MAE counts it to the head.
    final_norm = {id(parameter) for parameter in model.norm.parameters()}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in final_norm]
    if final_norm:
        groups.append({"params": list(model.norm.parameters()), "lr_scale": 1.0, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def head_groups(heads: nn.ModuleList, rates: Collection[float]) -> list[dict]:
    """Return a group for each of several heads, whose `lr_scale` is its rate over the largest."""
    scales = [rate / max(rates) for rate in rates]
    return [{"params": list(h.parameters()), "lr_scale": scale} for h, scale in zip(heads, scales, strict=True)]


def probe_sgd(groups: list[dict], weight_decay: float, device: torch.device) -> torch.optim.SGD:
    """Build SGD of linear probing, with momentum 0.9."""
    fused = device.type in ("cuda", "cpu")
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=weight_decay, fused=fused)
    for group in optimizer.param_groups:
        for parameter in group["params"]:  # the fused kernel leaves it unset where the very first step is skipped
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling for linear probing (You et al., 2017), as MAE uses it.

    Tensors of two and more dimensions: g <- g + weight_decay p, scaled by trust_coefficient |p| / |g| (by 1 where
    either norm is 0). 1-D tensors: the raw gradient. Then m <- momentum m + g, p <- p - lr m.

    Like the fused optimizers of torch it reads, where they are set, the attributes `grad_scale` (gradients are divided
    by it) and `found_inf` (nothing changes where it is 1), on the device.
    """

    _step_supports_amp_scaling = True

    def __init__(self, params, lr=0.0, weight_decay=0.0, momentum=0.9, trust_coefficient=0.001):
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: torch.Tensor, group: dict) -> None:
        gradient, grad_scale = parameter.grad, getattr(self, "grad_scale", None)
        if grad_scale is not None:
            gradient = gradient / grad_scale
        if parameter.ndim > 1:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
            weight_norm, gradient_norm = parameter.norm(), gradient.norm()
            trust = group["trust_coefficient"] * weight_norm / gradient_norm
            gradient = gradient * torch.where((weight_norm > 0) & (gradient_norm > 0), trust, 1.0)
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer, found_inf = state["momentum_buffer"], getattr(self, "found_inf", None)
        after = buffer * group["momentum"] + gradient
        change = after * -group["lr"]
        if found_inf is not None:
            skip = found_inf.to(buffer.device) > 0
            after, change = torch.where(skip, buffer, after), torch.where(skip, 0.0, change)
        buffer.copy_(after)
        parameter.add_(change)
