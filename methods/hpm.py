"""Hard patches mining (Wang et al., 2023): a second decoder predicts the loss of each patch, to mask the hard ones."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

import masking
from methods.base import At, Inputs, Loss, Plan, register
from methods.mae import MAE
from methods.teacher import follow, teacher_of
from models_mae import MaskedAutoencoderViT, init_linear
from util import precision


class LossPredictor(nn.Module):
    """A decoder of the same sizes as the model's, whose outputs for a patch are averaged to its predicted loss."""

    def __init__(self, model: MaskedAutoencoderViT):
        super().__init__()
        parts = copy.deepcopy((model.decoder_blocks, model.decoder_norm, model.decoder_pred))
        self.blocks, self.norm, self.pred = parts
        for module in self.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self.apply(init_linear)

    def forward(self, model: MaskedAutoencoderViT, x: torch.Tensor, mask: masking.Mask | None) -> torch.Tensor:
        """Predict losses from the decoder's input: (N, L), or of the decoded patches as from `forward_decoder`."""
        return model.run_decoder(self.blocks, self.norm, self.pred, x, mask).float().mean(dim=-1)


@register("hpm")
class HPM(MAE):
    """MAE with a decoder that learns which patches are hard; gives `patch_loss`, so use it with `--masking hpm`.

    Only the order of the predicted losses p must be that of the true ones t. Over ordered pairs (i, j) of an image's
    predicted patches the loss is -log sigmoid(p_j - p_i) where t_j > t_i, and -log sigmoid(p_i - p_j) where t_j < t_i.
    It is averaged over all n (n - 1) ordered pairs of the global batch; pairs of equal t add 0: only flat images have
    them. Masks follow what an exponential moving average of the network predicts for the whole image.

    Args:
        model, strategy: as for every method.
        weight: of the loss of the predicted losses.
        objective: "relative", as above, or "absolute": squared distance to the true losses, standardised per image.
        momentum, final_momentum: of the teacher in the first epoch and from epoch `momentum_epochs` on; linear between.
        momentum_epochs: see there.
    """

    offers = MAE.offers | {"patch_loss"}

    def __init__(
        self,
        model: MaskedAutoencoderViT,
        strategy: masking.base.Strategy,
        weight: float = 1.0,
        momentum: float = 0.999,
        final_momentum: float = 0.9999,
        momentum_epochs: int = 100,
        objective: str = "relative",
    ):
        super().__init__(model, strategy)
        if objective not in ("relative", "absolute"):
            raise ValueError(f"objective is {objective!r}; choose relative or absolute")
        self.objective = objective
        self.momentum = masking.base.check_share("momentum", momentum)
        self.final_momentum = masking.base.check_share("final_momentum", final_momentum)
        self.weight = masking.base.check_number("weight", weight)
        self.momentum_epochs = masking.base.check_number("momentum_epochs", momentum_epochs)
        self.predictor = LossPredictor(model)
        self.teacher = teacher_of(nn.ModuleDict({"model": model, "predictor": self.predictor}))
        for unused in ("decoder_blocks", "decoder_norm", "decoder_pred"):  # the teacher predicts no pixels
            delattr(self.teacher["model"], unused)

    def offered(self, inputs: Inputs, at: At) -> dict:
        """Return what a strategy may need; the losses that the teacher predicts only where this one does."""
        found = super().offered(inputs, at)
        if "patch_loss" in masking.base.needs(self.strategy_at(at)):
            found["patch_loss"] = self.predict(inputs.views[0])
        return found

    @torch.no_grad()
    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Return the losses (N, L) that the teacher predicts for normalised images (N, C, H, W), unmasked."""
        model = self.teacher["model"]
        with precision.autocast(self.amp, images.device):
            x = model.decoder_embed(model.encode(model.embed(images), None)) + model.decoder_pos_embed
            return self.teacher["predictor"](model, x, None)

    def choose(self, inputs: Inputs, at: At) -> Plan:
        """Choose which patches to remove, and count them and their ordered pairs."""
        plan = super().choose(inputs, at)
        number = plan.mask.predicted.sum(dim=1)
        plan.counts["hardness"] = (number * (number - 1 if self.objective == "relative" else 1)).sum()
        return plan

    def forward(self, inputs: Inputs, plan: Plan, at: At) -> dict[str, Loss]:
        """Predict the pixels of the removed patches, and the order of their losses."""
        model, images, mask = self.model, inputs.views[0], plan.mask
        x = model.decoder_input(model.forward_encoder(images, mask), mask)
        pred = model.run_decoder(model.decoder_blocks, model.decoder_norm, model.decoder_pred, x, mask)
        pixels = model.forward_loss(images, pred, mask) * plan.counts["pixels"]
        true = model.place_decoded(model.patch_losses(images, pred.detach(), mask)[..., None], mask)[..., 0]
        predicted = model.place_decoded(self.predictor(model, x, mask)[..., None], mask)[..., 0]
        compare = relative_loss if self.objective == "relative" else absolute_loss
        total, _ = compare(true, predicted, mask.predicted)
        return {
            "pixels": Loss(pixels, plan.counts["pixels"]),
            "hardness": Loss(self.weight * total, plan.counts["hardness"]),
        }

    def after_step(self, at: At, taken: torch.Tensor) -> None:
        """Move the teacher."""
        follow(self.teacher, self, self.momentum_at(at), taken)

    def momentum_at(self, at: At) -> float:
        """Return the teacher's momentum, which grows from epoch to epoch."""
        share = min(1.0, int(at.epoch) / self.momentum_epochs) if self.momentum_epochs else 1.0
        return self.momentum + (self.final_momentum - self.momentum) * share


def relative_loss(
    true: torch.Tensor, predicted: torch.Tensor, among: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare the order of predicted losses with that of the true ones, over ordered pairs.

    Args:
        true, predicted: (N, L).
        among: (N, L) bool, the patches that are compared.

    Returns:
        Sum over the pairs with different true losses, and their number; 0-dim each.
    """
    difference = predicted[:, None] - predicted[:, :, None]  # (N, L, L)
    sign = (true[:, None] - true[:, :, None]).sign() * (among[:, None] & among[:, :, None])
    return (F.softplus(-sign * difference) * sign.abs()).sum(), sign.abs().sum()


def absolute_loss(
    true: torch.Tensor, predicted: torch.Tensor, among: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare predicted losses with the true ones, standardised over the compared patches of each image.

    Args:
        true, predicted: (N, L).
        among: (N, L) bool, the patches that are compared.

    Returns:
        Sum of the squared differences, and their number; 0-dim each.
    """
    number = among.sum(dim=1, keepdim=True)
    centred = (true - (true * among).sum(dim=1, keepdim=True) / number) * among
    variance = centred.square().sum(dim=1, keepdim=True) / (number - 1).clamp_min(1)
    return ((predicted - centred / (variance + 1e-6).sqrt()).square() * among).sum(), number.sum()
