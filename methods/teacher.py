"""A teacher: a copy of the student that follows it as an exponential moving average (EMA)."""

from __future__ import annotations

import copy

import torch
from torch import nn


def teacher_of(student: nn.Module) -> nn.Module:
    """Return a copy of `student` that takes no gradient. As a module of a method it is saved and restored with it."""
    teacher = copy.deepcopy(student)
    for parameter in teacher.parameters():
        parameter.requires_grad = False
    return teacher


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float, taken: torch.Tensor) -> None:
    """Move every parameter of `teacher` that `student` has too: t <- t + (1 - momentum) (s - t).

    Args:
        teacher, student: modules whose parameters have the same names; those of one alone are left out.
        momentum: share of the old value that stays.
        taken: 0-dim bool on the device, whether the step was taken. If not, nothing changes, and the host need not
            wait to know.
    """
    followed = dict(student.named_parameters())
    pairs = [(t, followed[name]) for name, t in teacher.named_parameters() if name in followed]
    old, new = [t for t, _ in pairs], [s for _, s in pairs]
    change = torch._foreach_sub(new, old)
    torch._foreach_mul_(change, (1 - momentum) * taken)
    torch._foreach_add_(old, change)
