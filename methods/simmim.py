"""SimMIM (Xie et al., 2022): replace the removed patches, and predict their pixels with one linear layer."""

from __future__ import annotations

from timm.optim import param_groups_weight_decay

from masking.base import Strategy, check_number
from methods.base import At, Inputs, Loss, Method, Plan, register
from models_simmim import SimMIMViT
from util.config import PretrainSettings


@register("simmim")
class SimMIM(Method):
    """Mean absolute error over the pixels of the removed patches of the global batch; nothing is dropped.

    The learning rate rises from `warmup_start` of its peak, stays there, and falls to `decay_rate` of it once
    `decay_at` of the epochs are over; as the authors' it is one step late.

    Args:
        model, strategy: as for every method.
        warmup_start, decay_rate: shares of the peak of the learning rate.
        decay_at: share of the training.
    """

    model_class = SimMIMViT
    offers = frozenset({"grid", "patch_size", "progress", "epoch", "draw"})
    decodes_part = False
    betas = (0.9, 0.999)

    def __init__(
        self,
        model: SimMIMViT,
        strategy: Strategy,
        warmup_start: float = 0.005,
        decay_at: float = 0.875,
        decay_rate: float = 0.1,
    ):
        super().__init__(model, strategy)
        self.warmup_start = check_number("warmup_start", warmup_start)
        self.decay_at, self.decay_rate = check_number("decay_at", decay_at), check_number("decay_rate", decay_rate)

    @classmethod
    def from_settings(cls, settings: PretrainSettings, weights: dict | None = None, /, **options) -> SimMIM:
        """Build the method. ValueError, besides those of every method: a smallest rate, which its schedule has not."""
        if settings.min_lr:
            raise ValueError(
                f"--min_lr {settings.min_lr:g}: the schedule of --method simmim ends at decay_rate times the peak; "
                "leave it out, and give --method_args decay_rate=... instead"
            )
        return super().from_settings(settings, weights, **options)

    def choose(self, inputs: Inputs, at: At) -> Plan:
        """Choose which patches to replace; the loss has one term for each."""
        mask = self.choose_mask(inputs, at)
        return Plan({"pixels": mask.loss_weight.sum()}, mask, stats=mask.stats)

    def forward(self, inputs: Inputs, plan: Plan, at: At) -> dict[str, Loss]:
        """Encode all patches, the removed ones replaced; compare the pixels of these."""
        images, model = inputs.views[0], self.model
        pred = model.forward_decoder(model.encode(model.embed(images), plan.mask))
        return {"pixels": Loss(model.absolute_errors(images, pred, plan.mask).sum(), plan.counts["pixels"])}

    def schedule(self, at: At, lr: float, weight_decay: float) -> tuple[float, float]:
        """Return learning rate and weight decay of this step."""
        done = max(at.step - 1, 0)  # of the step before
        epoch = at.epoch * done / at.step if at.step else 0.0
        if epoch < self.warmup_epochs:
            share = self.warmup_start + (1 - self.warmup_start) * epoch / self.warmup_epochs
            return self.peak_lr * share, weight_decay
        late = epoch >= self.decay_at * at.epochs
        return self.peak_lr * (self.decay_rate if late else 1.0), weight_decay

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Return the optimizer's groups: 1-D tensors, biases and the class token are not decayed."""
        return param_groups_weight_decay(self, weight_decay, no_weight_decay_list=("model.cls_token",))
