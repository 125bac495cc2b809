"""iBOT (Zhou et al., 2022): a student predicts a teacher's prototypes of other views, and of its own masked patches."""

from __future__ import annotations

import copy
import random

import torch
from torch import nn

import masking
from masking.base import Strategy, check_number, check_share
from methods.base import At, Inputs, Loss, Method, Plan, check_own_views, register
from methods.heads import PrototypeHead
from methods.teacher import follow, teacher_of
from models_base import check_sizes
from models_ibot import IBOTViT
from util import lr_sched, precision, seeding
from util.config import PretrainSettings
from util.data.multi_crop import MultiCrop
from util.data.step_loader import MicroBatch
from util.distributed import world

Pair = tuple[torch.Tensor, torch.Tensor]


@register("ibot")
class IBOT(Method):
    """Cross entropy with a teacher's prototypes: of images between all views, and of the masked patches of a view.

    Masked patches are replaced in the student's two global views; the teacher sees both whole. What is left, `model`,
    is the teacher's encoder.

    Args:
        model, strategy: as for every method.
        out_dim, patch_out_dim: prototypes of images and of patches; the latter are the former's if None.
        hidden_dim, bottleneck_dim: of the heads.
        norm_last_layer: keep the norms of the prototypes at 1.
        freeze_last_layer: epochs in which the prototypes are not trained.
        drop_path: stochastic depth of the student's last block.
        student_temp: divides the student's logits.
        teacher_temp, teacher_patch_temp: divide the teacher's logits, of images and of patches.
        warmup_teacher_temp, warmup_teacher_patch_temp: the same in the first epoch.
        warmup_teacher_temp_epochs: epochs over which both rise, linearly.
        momentum: of the teacher at the beginning; 1 at the end, half a cosine between them.
        center_momentum: of the mean of the teacher's logits, which is subtracted from them.
        weight_decay_end: at the end of the training; half a cosine from `--weight_decay`.
        lambda1, lambda2: weights of the images' and of the patches' loss.
        pred_ratio, pred_ratio_var: centres of the mask ratios, and half the width of the range around each. By default
            half of the views are whole and the others have U[0.1, 0.5]; under AttMask 0.3 and 0.2.
        pred_start_epoch: epochs without masks.
        ratio_per: "view" draws a ratio for each view; "step" one for all, and which views are masked (AttMask).
        masking_prob: share of the views that are masked where `ratio_per` is "step"; 0.5 if None.
        local_crops_number, local_size, local_crops_scale: number of local views, side in pixels, range of the area.
    """

    model_class = IBOTViT
    offers = frozenset({"grid", "patch_size", "progress", "epoch", "draw", "attention"})
    decodes_part = False
    changes_colours = True
    betas = (0.9, 0.999)
    clip_each = True
    may_freeze = ("last_layer",)
    shown = ("mask_ratio", "grad_norm")

    def __init__(
        self,
        model: IBOTViT,
        strategy: Strategy,
        out_dim: int = 8192,
        patch_out_dim: int | None = None,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = False,
        freeze_last_layer: int = 1,
        drop_path: float = 0.1,
        student_temp: float = 0.1,
        teacher_temp: float = 0.07,
        teacher_patch_temp: float = 0.07,
        warmup_teacher_temp: float = 0.04,
        warmup_teacher_patch_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 30,
        momentum: float = 0.996,
        center_momentum: float = 0.9,
        weight_decay_end: float = 0.4,
        lambda1: float = 1.0,
        lambda2: float = 1.0,
        pred_ratio: float | list[float] | None = None,
        pred_ratio_var: float | list[float] | None = None,
        pred_start_epoch: int = 0,
        ratio_per: str | None = None,
        masking_prob: float | None = None,
        local_crops_number: int = 10,
        local_size: int = 96,
        local_crops_scale: list[float] | tuple[float, float] = (0.05, 0.25),
    ):
        super().__init__(model, strategy)
        self.freeze_last_layer = _whole("freeze_last_layer", freeze_last_layer, 0)
        self.pred_start_epoch = _whole("pred_start_epoch", pred_start_epoch, 0)
        self.student_temp = check_number("student_temp", student_temp, exclusive=True)
        self.temperatures = {
            "teacher_temp": (warmup_teacher_temp, teacher_temp),
            "teacher_patch_temp": (warmup_teacher_patch_temp, teacher_patch_temp),
        }
        for name, pair in self.temperatures.items():
            for value, prefix in zip(pair, ("warmup_", ""), strict=True):
                check_number(prefix + name, value, exclusive=True)
        self.temperature_epochs = _whole("warmup_teacher_temp_epochs", warmup_teacher_temp_epochs, 0)
        self.momentum = check_share("momentum", momentum)
        self.center_momentum = check_share("center_momentum", center_momentum)
        self.weight_decay_end = check_number("weight_decay_end", weight_decay_end)
        self.weights = check_number("lambda1", lambda1), check_number("lambda2", lambda2)
        self.ratio_per = getattr(strategy, "ratio_per", "view") if ratio_per is None else ratio_per
        self.masking_prob = _check_rule(self.ratio_per, masking_prob)
        self.ratios = masking.check_ratios(pred_ratio, pred_ratio_var, self.ratio_per)
        self.local_number = _whole("local_crops_number", local_crops_number, 0)
        self.local_size, self.local_scale = _check_locals(model, local_size, local_crops_scale)

        width = model.cls_token.shape[-1]
        sizes = [_whole("hidden_dim", hidden_dim), _whole("bottleneck_dim", bottleneck_dim), _whole("out_dim", out_dim)]
        patches = None if patch_out_dim is None else _whole("patch_out_dim", patch_out_dim)
        self.head = PrototypeHead(width, *sizes, patches, train_norms=not norm_last_layer)
        self.teacher_head = teacher_of(self.head)
        self.student = copy.deepcopy(model)
        self.student.set_drop_path(check_share("drop_path", drop_path))
        for parameter in model.parameters():
            parameter.requires_grad = False
        self.masked_embed = nn.Parameter(torch.zeros(1, width))
        self.register_buffer("center_cls", torch.zeros(1, out_dim))
        self.register_buffer("center_patch", torch.zeros(1, 1, patches or out_dim))
        self._compare = compare
        self._seen: list[torch.Tensor] = []  # sums of the teacher's unit vectors, of each micro-batch of a step

    @classmethod
    def from_settings(cls, settings: PretrainSettings, weights: dict | None = None, /, **options) -> IBOT:
        """Build the method. ValueError, besides those of every method: other images than RGB, a ratio of the masks."""
        check_own_views(settings)
        _check_ratio_is_free(settings)
        method = super().from_settings(settings, weights, **options)
        if settings.weight_decay == 0 < method.weight_decay_end:
            raise ValueError(
                f"--weight_decay 0: --method ibot raises it to {method.weight_decay_end:g}, which cannot begin at 0; "
                "take more, or give --method_args weight_decay_end=0"
            )
        size, scale, own = method.model.patch_embed.img_size, tuple(settings.crop_scale), method.local_size
        method.views = MultiCrop(size, scale, settings.hflip, (own, own), method.local_scale, method.local_number)
        return method

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the activations of the student's blocks again in the backward pass."""
        self.student.set_grad_checkpointing(enable)

    def compile_parts(self) -> None:
        """Compile the losses over the prototypes, too: a dozen passes over (V N + M, K) become a few."""
        super().compile_parts()
        self._compare = torch.compile(compare, dynamic=True, fullgraph=True)

    def inputs(self, micro_batch: MicroBatch, seed: int, device: torch.device) -> Inputs:
        """Put a micro-batch on the device: global views, then local ones, and what the masks draw for both global ones.

        `noise` is (2 N, L), all images of the first view before those of the second.
        """
        views = []
        for stack in micro_batch.batch[0]:  # (N, n, 3, h, w)
            count = stack.shape[1]
            moved = stack.to(device, non_blocking=True).transpose(0, 1).flatten(0, 1)
            views += self.normalize(moved).chunk(count)
        noise = [self.noise(micro_batch, seed, device, s) for s in (seeding.NOISE, seeding.SECOND_NOISE)]
        draw, ratios = seeding.step_draw(seed, micro_batch.step), self.draw_ratios(micro_batch, seed)
        return Inputs(views, torch.cat(noise), torch.tensor(micro_batch.indices), draw=draw, ratios=ratios)

    def draw_ratios(self, micro_batch: MicroBatch, seed: int) -> masking.Ratios:
        """Draw the mask ratio of each global view, a function of (seed, step, place in the step), 0 for a whole one."""
        places, step = micro_batch.places, micro_batch.step
        if self.ratio_per == "view":
            own = [random.Random(seeding.derive(seed, seeding.RATIO, step, place)) for place in places]
            drawn = [[masking.draw_ratio(generator, *self.ratios) for _ in range(2)] for generator in own]
            return masking.Ratios(tuple(pair[view] for view in range(2) for pair in drawn))
        shared = random.Random(seeding.derive(seed, seeding.RATIO, step))
        first, second = (masking.draw_ratio(shared, *self.ratios) for _ in range(2))
        gate = seeding.step_noise(seed, step, places, micro_batch.step_size, 2, torch.device("cpu"), seeding.GATE)
        rows = tuple(first if u <= self.masking_prob else 0.0 for u in gate.T.flatten().tolist())
        return masking.Ratios(rows, second)

    def choose(self, inputs: Inputs, at: At) -> Plan:
        """Let the teacher see both global views whole; choose which of their patches the student does not."""
        images, strategy = torch.cat(inputs.views[:2]), self.strategy_at(at)  # (2 N, 3, H, W)
        offered = {"grid": self.model.patch_embed.grid_size, "patch_size": self.model.patch_embed.patch_size}
        offered |= {"progress": at.progress, "epoch": (int(at.epoch), at.epochs), "draw": inputs.draw}
        ratios = inputs.ratios
        if int(at.epoch) < self.pred_start_epoch:
            ratios = masking.Ratios((0.0,) * len(images), ratios.second)
        with torch.no_grad():
            latent, offered["attention"] = self.teacher_latent(images, "attention" in masking.base.needs(strategy))
            reads = masking.reads_tokens(strategy)
            tokens = self.student.embed(images) if reads else self.student._blank_tokens(len(images))
            return self.plan(latent, masking.replace(strategy, tokens, ratios, inputs.noise, **offered))

    def teacher_latent(self, images: torch.Tensor, attends: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the teacher's tokens (n, L + 1, D), and if it `attends` its class token's attention (n, heads, L)."""
        with precision.autocast(self.amp, images.device):
            tokens = self.model.embed_view(images)
            return self.model.encode_attending(tokens) if attends else (self.model.encode(tokens), None)

    def plan(self, latent: torch.Tensor, replaced: masking.Replaced) -> Plan:
        """Count the losses' terms; keep of the teacher's tokens (2 N, L + 1, D) what losses and centres need."""
        with precision.autocast(self.amp, latent.device):
            unit = self.teacher_head.project(latent)  # (2 N, L + 1, bottleneck)
        self._seen.append(_sums(unit))
        count = torch.full((), len(unit) // 2, device=unit.device)
        stats = {"mask_ratio": replaced.mask.float().mean(dim=1)} | (replaced.stats or {})
        return Plan({"cls": count, "patch": count}, extra=self.kept(unit, replaced), stats=stats)

    def kept(self, unit: torch.Tensor, replaced: masking.Replaced) -> dict[str, torch.Tensor]:
        """Choose among the teacher's unit vectors (2 N, L + 1, d) those of class tokens and of masked patches."""
        places = replaced.places()  # (M,) among all 2 N * L
        patches = unit[:, 1:].flatten(0, 1)[places]
        return {"mask": replaced.mask, "places": places, "unit_cls": unit[:, 0], "unit_patch": patches}

    def student_latent(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Encode global views (n, 3, H, W), the patches of `mask` (n, L) replaced -> (n, L + 1, D)."""
        hidden = self.masked_embed + self.student.positions(images)[:, 1:]  # (1, L, D)
        tokens = self.student.embed_view(images)
        return self.student.encode(torch.where(mask[..., None], hidden.to(tokens.dtype), tokens))

    def forward(self, inputs: Inputs, plan: Plan, at: At) -> dict[str, Loss]:
        """Compare what the student makes of every view with what the teacher makes of the others."""
        given, num_images = plan.extra, len(inputs.views[0])
        latent = self.student_latent(torch.cat(inputs.views[:2]), given["mask"])
        classes = [latent[:, 0]]
        if len(inputs.views) > 2:
            classes.append(self.student.encode(self.student.embed_view(torch.cat(inputs.views[2:])))[:, 0])
        masked = latent[:, 1:].flatten(0, 1)[given["places"]]  # (M, D)
        of_classes = self.head.of_images(self.head.project(torch.cat(classes))).unflatten(0, (-1, num_images))
        of_patches = self.head.of_patches(self.head.project(masked))
        with torch.no_grad():
            of_images = self.teacher_head.of_images(given["unit_cls"]).unflatten(0, (2, -1))
            of_masked = self.teacher_head.of_patches(given["unit_patch"])
            view = given["places"].div(given["mask"].shape[1], rounding_mode="floor")  # (M,) which each patch is of
            weight = 1 / (2 * given["mask"].sum(dim=1).clamp(min=1))[view]
        temperatures = [self.temperature_at(name, int(at.epoch)) for name in self.temperatures]
        between, within = self._compare(
            (of_classes, of_patches),
            (of_images, of_masked),
            (self.center_cls, self.center_patch[0]),
            (self.student_temp, *temperatures),
            weight,
        )
        return {
            "cls": Loss(self.weights[0] * between, plan.counts["cls"]),
            "patch": Loss(self.weights[1] * within, plan.counts["patch"]),
        }

    def temperature_at(self, name: str, epoch: int) -> float:
        """Return `teacher_temp` or `teacher_patch_temp` of an epoch."""
        first, last = self.temperatures[name]
        if name == "teacher_patch_temp":
            epoch = max(epoch - self.pred_start_epoch, 0)
        if epoch >= self.temperature_epochs:
            return last
        return first + (last - first) * epoch / max(self.temperature_epochs - 1, 1)

    def on_gradients(self, at: At) -> None:
        """Freeze the prototypes in the first epochs."""
        if at.epoch < self.freeze_last_layer:
            for name, parameter in self.head.named_parameters():
                if name.startswith("last_layer"):
                    parameter.grad = None

    @torch.no_grad()
    def after_step(self, at: At, taken: torch.Tensor) -> None:
        """Move the centres, with the logits of the teacher that was asked in this step; then move the teacher."""
        sums = world.all_reduce(torch.stack(self._seen).sum(dim=0))  # (2, bottleneck + 1)
        self._seen.clear()
        classes, patches = sums[:, :-1] / sums[:, -1:]  # the last layer is linear: of the mean it is the mean
        means = self.teacher_head.of_images(classes), self.teacher_head.of_patches(patches)
        for center, mean in zip((self.center_cls, self.center_patch), means, strict=True):
            moved = center.lerp(mean.view_as(center), 1 - self.center_momentum)
            center.copy_(torch.where(taken, moved, center))
        follow(self.model, self.student, self.momentum_at(at), taken)
        follow(self.teacher_head, self.head, self.momentum_at(at), taken)

    def momentum_at(self, at: At) -> float:
        """Return the teacher's momentum in a step."""
        return lr_sched.half_cosine(at.progress, self.momentum, 1.0)

    def schedule(self, at: At, lr: float, weight_decay: float) -> tuple[float, float]:
        """Return the learning rate, whose warm-up ends with the peak, and the weight decay; both are half a cosine."""
        rates = {"lr": self.peak_lr, "min_lr": self.min_lr, "warmup_epochs": self.warmup_epochs}
        decay = lr_sched.half_cosine(at.progress, weight_decay, self.weight_decay_end)
        return lr_sched.stepwise(at.step, at.epoch, at.epochs, **rates), decay


def _check_ratio_is_free(settings: PretrainSettings) -> None:
    """Raise ValueError for settings of the masks that the ratio of each view would pass over in silence."""
    if settings.mask_ratio != PretrainSettings.mask_ratio:
        raise ValueError(
            f"--mask_ratio {settings.mask_ratio}: --method ibot draws the ratio of each view; leave it out, and give "
            "--method_args pred_ratio=0.5 pred_ratio_var=0.1, say, for U[0.4, 0.6], instead"
        )
    idle = [pair for pair in settings.masking_args if pair.partition("=")[0] in ("mask_ratio", "rounding", "cell")]
    if idle:
        raise ValueError(
            f"--masking_args {' '.join(idle)}: --method ibot draws the ratio of each view, and masks that share of its "
            "single patches, rounded down; leave it out"
        )
    if settings.masking in ("schedule", "inverse_block"):
        raise ValueError(
            f"--masking {settings.masking}: sets the ratio, which --method ibot draws for each view; choose another "
            "strategy"
        )
    if settings.masking == "block" and settings.masking_args:
        raise ValueError(
            f"--masking_args {' '.join(settings.masking_args)}: --method ibot draws blocks by iBOT's rule, which has "
            "no options; leave them out"
        )


def compare(
    student: Pair, teacher: Pair, centers: Pair, temperatures: tuple[float, float, float], weight: torch.Tensor
) -> Pair:
    """Compute both losses, summed over the images: of class tokens between views, of masked patches within them.

    Args:
        student: logits (V, N, K) of class tokens, the two global views first, and (M, K') of masked patches.
        teacher: the same of the two global views, (2, N, K) and (M, K').
        centers: (1, K) and (1, K'), subtracted from the teacher's logits.
        temperatures: of the student, and of the teacher's class tokens and patches.
        weight: (M,) of each masked patch.
    """
    classes, patches = (logits.float() / temperatures[0] for logits in student)
    parts = zip(teacher, centers, temperatures[1:], strict=True)
    targets = [((logits.float() - center) / divisor).softmax(dim=-1) for logits, center, divisor in parts]
    return between_views(classes, targets[0]), (weight * cross_entropy(patches, targets[1])).sum()


def between_views(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum over the images the mean cross entropy between each global view and every other view.

    Args:
        logits: (V, N, K) of the student, the two global views first.
        targets: (2, N, K) of the teacher's global views.
    """
    log_probability = logits.log_softmax(dim=-1)
    everywhere = log_probability.sum(dim=0)  # (N, K)
    pairs = 2 * (len(logits) - 1)
    return -sum((targets[q] * (everywhere - log_probability[q])).sum() for q in (0, 1)) / pairs


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy of each row: logits and targets (M, K) -> (M,)."""
    return -(targets * logits.log_softmax(dim=-1)).sum(dim=-1)


def _sums(unit: torch.Tensor) -> torch.Tensor:
    """Sum unit vectors (n, L + 1, d) of class tokens, and of patches; the last column is their number: (2, d + 1)."""
    classes, patches = unit[:, 0], unit[:, 1:].flatten(0, 1)
    return torch.stack([torch.cat([x.sum(dim=0), x.new_full((1,), len(x))]) for x in (classes, patches)])


def _whole(name: str, value: int, minimum: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {minimum}")
    return value


def _check_rule(ratio_per: str, masking_prob: float | None) -> float:
    """Return the share of the views that are masked, if the rule for their ratios has one."""
    if ratio_per not in ("view", "step"):
        raise ValueError(f"ratio_per is {ratio_per!r}; choose view or step")
    if masking_prob is not None and ratio_per == "view":
        raise ValueError(
            f"masking_prob is {masking_prob!r}, which ratio_per view passes over: there a pred_ratio of 0 leaves views "
            "whole; leave it out, or choose ratio_per=step"
        )
    return check_share("masking_prob", 0.5 if masking_prob is None else masking_prob)


def _check_locals(model: IBOTViT, size: int, scale) -> tuple[int, tuple[float, float]]:
    """Return size and scale of the local views, if they fit the model."""
    size, (height, width) = _whole("local_size", size), model.patch_embed.img_size
    if size > min(height, width):
        raise ValueError(
            f"local_size is {size}, but a global view has {height} x {width} pixels; choose a smaller local_size, or a "
            "larger --input_size"
        )
    try:
        check_sizes(size, model.patch_embed.patch_size, 3)
    except ValueError as error:
        patch = " x ".join(map(str, model.patch_embed.patch_size))
        raise ValueError(
            f"local_size is {size}, which is not a whole number of patches of {patch} pixels; choose a multiple"
        ) from error
    if not isinstance(scale, (list, tuple)) or len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(
            f"local_crops_scale is {scale!r}; give two numbers, the smallest and the largest area, in (0, 1]"
        )
    return size, tuple(scale)
