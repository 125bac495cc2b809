"""Projection heads: with batch normalisation over the images of all processes, and onto prototypes."""

from __future__ import annotations

import torch
import torch.distributed as td
import torch.nn.functional as F
from torch import nn

from util.distributed import world
from util.precision import no_autocast


class _Sum(torch.autograd.Function):
    """The sum over all processes, which each of them differentiates: so gradients are summed, too."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return world.all_reduce(x.clone())

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return world.all_reduce(gradient.clone())


class GlobalBatchNorm(nn.BatchNorm1d):
    """Batch normalisation with the statistics of the rows of all processes, on GPUs and on CPUs, in any format.

    `torch.nn.SyncBatchNorm` does the same on GPUs only. In evaluation mode it uses its running statistics.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x (N, C) -> (N, C) fp32."""
        x = x.float()
        if not self.training:
            return super().forward(x)
        count = torch.full((1,), float(len(x)), device=x.device)
        total = torch.cat([count, x.sum(dim=0)])
        total = _Sum.apply(total) if td.is_initialized() else total
        count, mean = total[0], total[1:] / total[0]
        squares = (x - mean).square().sum(dim=0)
        squares = _Sum.apply(squares) if td.is_initialized() else squares
        with torch.no_grad():
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(squares.detach() / (count - 1).clamp(min=1), self.momentum)
            self.num_batches_tracked.add_(1)
        return (x - mean) / (squares / count + self.eps).sqrt() * self.weight + self.bias


class ProjectionHead(nn.Module):
    """Linear, batch normalisation, ReLU, linear without bias."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int):
        super().__init__()
        self.fc0, self.bn0 = nn.Linear(dim, hidden_dim), GlobalBatchNorm(hidden_dim, eps=1e-6)
        self.fc1 = nn.Linear(hidden_dim, out_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, dim) -> (N, out_dim)."""
        return self.fc1(torch.relu(self.bn0(self.fc0(x))))


class Prototypes(nn.Module):
    """A linear layer without bias whose rows have the norm `weight_g`: W = g v / |v| for each row v of `weight_v`."""

    def __init__(self, dim: int, number: int):
        super().__init__()
        self.weight_v = nn.Parameter(nn.Linear(dim, number, bias=False).weight.detach())  # (K, dim)
        self.weight_g = nn.Parameter(torch.ones(number, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> (..., K)."""
        with no_autocast(x.device.type):  # half-precision logits would be too coarse for the temperature of 0.04
            return F.linear(x.float(), self.weight_g * F.normalize(self.weight_v, dim=1))


class PrototypeHead(nn.Module):
    """The head of DINO and iBOT: an MLP of three layers, normalisation, and prototypes of images and of patches.

    Args:
        dim: width of the tokens.
        hidden_dim, bottleneck_dim: of the MLP, and of what it returns.
        out_dim: prototypes of images.
        patch_out_dim: prototypes of patches, in a layer of their own; None: those of images serve for both.
        train_norms: whether the prototypes' norms are trained.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        bottleneck_dim: int,
        out_dim: int,
        patch_out_dim: int | None,
        train_norms: bool = True,
    ):
        super().__init__()
        widths = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, hidden_dim), nn.Linear(hidden_dim, bottleneck_dim)
        self.mlp = nn.Sequential(widths[0], nn.GELU(), widths[1], nn.GELU(), widths[2])
        for layer in widths:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.last_layer = Prototypes(bottleneck_dim, out_dim)
        self.last_layer2 = None if patch_out_dim is None else Prototypes(bottleneck_dim, patch_out_dim)
        for layer in (self.last_layer, self.last_layer2):
            if layer is not None:
                layer.weight_g.requires_grad = train_norms

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Project tokens (..., dim) -> unit vectors (..., bottleneck_dim) fp32."""
        return F.normalize(self.mlp(x).float(), dim=-1)

    def of_images(self, unit: torch.Tensor) -> torch.Tensor:
        """Compare unit vectors of class tokens with the prototypes: (..., bottleneck_dim) -> (..., out_dim)."""
        return self.last_layer(unit)

    def of_patches(self, unit: torch.Tensor) -> torch.Tensor:
        """Do the same for unit vectors of patch tokens -> (..., patch_out_dim or out_dim)."""
        return (self.last_layer if self.last_layer2 is None else self.last_layer2)(unit)
