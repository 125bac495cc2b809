"""Masked autoencoder (He et al., 2022): predict the pixels of the removed patches from the kept ones."""

from __future__ import annotations

from methods.base import At, Inputs, Loss, Method, Plan, register


@register("mae")
class MAE(Method):
    """Mean squared error over the removed patches of the global batch (Eq. 2), for every masking strategy."""

    def choose(self, inputs: Inputs, at: At) -> Plan:
        """Choose which patches to remove; the loss has one term for each that is predicted."""
        mask = self.choose_mask(inputs, at)
        return Plan({"pixels": mask.loss_weight.sum()}, mask, stats=mask.stats)

    def forward(self, inputs: Inputs, plan: Plan, at: At) -> dict[str, Loss]:
        """Encode the kept patches, decode, compare the predicted ones."""
        count = plan.counts["pixels"]
        loss, _ = self.model.forward_masked(inputs.views[0], plan.mask)
        return {"pixels": Loss(loss * count, count)}
