"""Projection heads, and the batch normalisation in them, which is over the images of all processes."""

from __future__ import annotations

import torch
import torch.distributed as td
import torch.distributed.nn.functional as tdf
from torch import nn


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
        total = tdf.all_reduce(total) if td.is_initialized() else total
        count, mean = total[0], total[1:] / total[0]
        squares = (x - mean).square().sum(dim=0)
        squares = tdf.all_reduce(squares) if td.is_initialized() else squares
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
