"""BootMAE (Dong et al., 2022): predict pixels, and the features of a teacher that follows the student."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay

from masking.base import Strategy, check_number, check_share
from methods.base import At, Inputs, Loss, Method, Plan, register
from methods.teacher import follow, teacher_of
from models_bootmae import BootMAEViT
from util import lr_sched, precision


@register("bootmae")
class BootMAE(Method):
    """Squared error of the pixels and of the teacher's features over the removed patches of the global batch.

    A patch counts 1 + the share of removed ones among the nine around it (Eq. 3), over the number of removed patches.

    Args:
        model, strategy: as for every method.
        weight: of the features' loss, reached after a quarter of the epochs.
        weigh_surrounded: False counts every removed patch once.
        momentum: of the teacher in the first epoch; 0.9999 from epoch 100 on.
        last_momentum: of the teacher from epoch 400 on, linear between: 0.99999 for ViT-B, 0.9999 for ViT-L.
    """

    model_class = BootMAEViT
    offers = frozenset({"grid", "patch_size", "progress", "epoch", "draw"})
    decodes_part = False

    def __init__(
        self,
        model: BootMAEViT,
        strategy: Strategy,
        weight: float = 1.0,
        weigh_surrounded: bool = True,
        momentum: float = 0.999,
        last_momentum: float = 0.99999,
    ):
        super().__init__(model, strategy)
        self.momentum = check_share("momentum", momentum)
        self.last_momentum = check_share("last_momentum", last_momentum)
        if not isinstance(weigh_surrounded, bool):
            raise ValueError(f"weigh_surrounded is {weigh_surrounded!r}; it must be true or false")
        self.weight, self.weigh_surrounded = check_number("weight", weight), weigh_surrounded
        self.teacher = teacher_of(model)
        for name in [n for n, _ in self.teacher.named_children() if n not in ("patch_embed", "blocks", "norm")]:
            delattr(self.teacher, name)  # the teacher is the encoder
        for name in ("mask_token", "mask_token_1", "de_pos_embed"):
            delattr(self.teacher, name)

    def choose(self, inputs: Inputs, at: At) -> Plan:
        """Choose which patches to remove, and ask the teacher for the features of all."""
        mask, images = self.choose_mask(inputs, at), inputs.views[0]
        with torch.no_grad(), precision.autocast(self.amp, images.device):
            features = self.teacher.encode_features(self.teacher.embed(images), None)[1][:, 1:].float()  # (N, L, D)
        removed = mask.predicted.sum()
        return Plan({"pixels": removed, "features": removed}, mask, {"features": features}, mask.stats)

    def forward(self, inputs: Inputs, plan: Plan, at: At) -> dict[str, Loss]:
        """Encode the kept patches; compare pixels and features of the removed ones."""
        model, images, mask, count = self.model, inputs.views[0], plan.mask, plan.counts["pixels"]
        first, last = model.encode_features(model.embed(images), mask)
        latent, weight = model.norm(last), self.patch_weights(mask.predicted)
        pixels = (model.regress(latent, first, mask).float() - model.pixel_target(images)).square().mean(dim=-1)
        predicted = model.predict_features(latent, last, mask).float()
        features = (normalise(plan.extra["features"]) - normalise(predicted)).square().mean(dim=-1)
        return {
            "pixels": Loss((weight * pixels).sum(), count),
            "features": Loss(self.feature_weight(at) * (weight * features).sum(), count),
        }

    def patch_weights(self, removed: torch.Tensor) -> torch.Tensor:
        """Return what each patch counts, from removed (N, L) bool: (N, L)."""
        mask = removed.float()
        if not self.weigh_surrounded:
            return mask
        around = F.avg_pool2d(mask.view(-1, 1, *self.model.patch_embed.grid_size), 3, stride=1, padding=1)
        return mask * around.flatten(1) + mask

    def feature_weight(self, at: At) -> float:
        """Return the weight of the features' loss, which grows from epoch to epoch."""
        return min(4 * self.weight * (int(at.epoch) + 1) / max(at.epochs, 1), self.weight)

    def after_step(self, at: At, taken: torch.Tensor) -> None:
        """Move the teacher."""
        follow(self.teacher, self.model, self.momentum_at(int(at.epoch)), taken)

    def momentum_at(self, epoch: int) -> float:
        """Return the teacher's momentum in an epoch."""
        if epoch < 100:
            return self.momentum + epoch / 100 * (0.9999 - self.momentum)
        return 0.9999 + min(300, epoch - 100) / 300 * (self.last_momentum - 0.9999)

    def schedule(self, at: At, lr: float, weight_decay: float) -> tuple[float, float]:
        """Return learning rate and weight decay: the warm-up's last step has the peak; then a cosine to `min_lr`."""
        rates = {"lr": self.peak_lr, "min_lr": self.min_lr, "warmup_epochs": self.warmup_epochs}
        return lr_sched.stepwise(at.step, at.epoch, at.epochs, **rates), weight_decay

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Return the optimizer's groups: 1-D tensors, biases and the class token are not decayed."""
        return param_groups_weight_decay(self, weight_decay, no_weight_decay_list=("model.cls_token",))


def normalise(features: torch.Tensor) -> torch.Tensor:
    """Normalise features (..., D) to mean 0 and deviation 1."""
    return F.layer_norm(features, features.shape[-1:], eps=1e-6)
