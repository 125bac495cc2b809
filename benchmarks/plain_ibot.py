"""iBOT as it is commonly run: every view by itself, logits of all tokens."""

from __future__ import annotations

import torch

import masking
from methods import IBOT, At, Inputs, Loss, Plan
from methods.ibot import compare
from util import precision


class PlainIBOT(IBOT):
    """The same losses, without what is saved here.

    Teacher and student take one view after the other; the heads compute the logits of every patch of the global views,
    masked or not.
    """

    def teacher_latent(self, images: torch.Tensor, attends: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Let the teacher see one global view (n, 3, H, W) of two after the other."""
        halves = [super(PlainIBOT, self).teacher_latent(half, attends) for half in images.chunk(2)]
        latents, attention = zip(*halves, strict=True)
        return torch.cat(latents), torch.cat(attention) if attends else None

    def kept(self, unit: torch.Tensor, replaced: masking.Replaced) -> dict[str, torch.Tensor]:
        """Compute the teacher's logits of all unit vectors (2 N, L + 1, d)."""
        with precision.autocast(self.amp, unit.device):
            classes = self.teacher_head.of_images(unit[:, 0]).unflatten(0, (2, -1))  # (2, N, K)
            patches = self.teacher_head.of_patches(unit[:, 1:].flatten(0, 1))  # (2 N L, K)
        return {"mask": replaced.mask, "classes": classes, "patches": patches}

    def forward(self, inputs: Inputs, plan: Plan, at: At) -> dict[str, Loss]:
        """Compare what the student makes of one view after the other with what the teacher makes of the others."""
        mask = plan.extra["mask"]
        latents = [self.student_latent(*pair) for pair in zip(inputs.views[:2], mask.chunk(2), strict=True)]
        latents += [self.student.encode(self.student.embed_view(view)) for view in inputs.views[2:]]
        classes = torch.stack([self.head.of_images(self.head.project(latent[:, 0])) for latent in latents])
        patches = torch.cat([self.head.of_patches(self.head.project(latent[:, 1:])) for latent in latents[:2]])
        weight = mask / (2 * mask.sum(dim=1, keepdim=True).clamp(min=1))  # (2 N, L), 0 where not masked
        temperatures = [self.temperature_at(name, int(at.epoch)) for name in self.temperatures]
        between, within = compare(
            (classes, patches.flatten(0, 1)),
            (plan.extra["classes"], plan.extra["patches"]),
            (self.center_cls, self.center_patch[0]),
            (self.student_temp, *temperatures),
            weight.flatten(),
        )
        losses = {"cls": between, "patch": within}
        return {name: Loss(w * losses[name], plan.counts[name]) for name, w in zip(losses, self.weights, strict=True)}
