"""The settings of the three tasks, with MAE's names. What they mean stands in `help`, once, for users and readers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from util.distributed import world


def option(default: Any, help: str, **keywords) -> Any:
    """A dataclass field with its help text; a list default is copied for every instance."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata={"help": help, **keywords})
    return dataclasses.field(default=default, metadata={"help": help, **keywords})


@dataclass
class Settings:
    """What all three tasks share. Groups: what changes the result, what only makes it fast, what only shows it."""

    # What changes the result
    model: str = option("", "name of the architecture")
    input_size: list[int] = option([], "image side in pixels, or height and width; default: the model's own")
    patch_size: list[int] = option([], "patch side in pixels, or height and width; default: the model's own")
    in_chans: int = option(3, "channels of the images: 1 grey, 3 RGB, 4 RGBA; others with --loader or wds")
    dataset: str = option("folder", "folder, wds, hfds/NAME, torch/NAME, or digits (built in); see docs/DATA.md")
    data_path: str | None = option(None, "folder with train/<class>/ and val/<class>/; pre-training takes any pictures")
    max_bad_images: float = option(0.001, "share of the pictures that may be undecodable; more stop the run")
    mean: list[float] = option([], "mean of each channel, of 0..1; default: ImageNet's for RGB, else 0.5")
    std: list[float] = option([], "deviation of each channel; default: ImageNet's for RGB, else 0.5")
    hflip: float = option(0.5, "probability of a horizontal flip")
    batch_size: int = option(64, "images per process and micro-batch")
    accum_iter: int | None = option(None, "micro-batches per optimizer step; follows from --effective_batch_size")
    effective_batch_size: int | None = option(None, "images per optimizer step over all processes and micro-batches")
    epochs: int = option(400, "length of the schedule")
    warmup_epochs: float = option(40, "epochs of linear warm-up of the learning rate")
    blr: float = option(1e-3, "base learning rate: lr = blr * effective batch / 256")
    lr: float | None = option(None, "learning rate, overrides --blr")
    min_lr: float = option(0.0, "learning rate at the end of the schedule")
    weight_decay: float = option(0.05, "weight decay")
    clip_grad: float | None = option(None, "largest norm of the gradient; default: no clipping")
    max_skipped_steps: int = option(10, "steps in a row that may be skipped because loss or gradient is not finite")
    seed: int = option(0, "of everything random")
    resume: str | None = option(None, "checkpoint of the same task to continue from, unless --output_dir has its own")
    # What only makes it fast
    device: Literal["cuda", "cpu"] | None = option(None, "cuda or cpu; default: cuda where there is one")
    amp: Literal["bf16", "fp16", "none"] | None = option(
        None, "autocast format; default: bf16 or fp16 on GPU, none on CPU"
    )
    compile: bool = option(False, "torch.compile the model")
    grad_checkpointing: bool = option(False, "compute activations again in the backward pass: less memory, more time")
    channels_last: bool = option(False, "store the patch embedding channels last; slower on a CPU")
    num_workers: int = option(10, "loader processes per training process")
    pin_mem: bool = option(True, "page-locked host memory, for faster copies to a GPU")
    dist_timeout: float = option(1800, "seconds after which a process that waits for the others gives up")
    # What only shows it
    output_dir: str = option("./output_dir", "folder for checkpoints, log.txt and config.yaml")
    log_dir: str | None = option(None, "folder for TensorBoard; default: --output_dir")
    print_freq: int = option(20, "optimizer steps between two lines of the log")
    save_every_epochs: int | None = option(20, "epochs between two checkpoints that are kept; null keeps only the last")
    save_every_minutes: float = option(10, "minutes between two writings of checkpoint-last.pth within an epoch")
    keep_last: int | None = option(None, "how many checkpoint-{epoch}.pth stay; default: all")

    def check(self) -> None:
        """ValueError, in one sentence with flag, value and remedy, for values that cannot work in any task."""
        self._check_minimum(1, "in_chans", "batch_size", "accum_iter", "effective_batch_size", "print_freq")
        self._check_minimum(1, "save_every_epochs", "keep_last", "dist_timeout")
        self._check_minimum(0, "save_every_minutes", "max_skipped_steps")
        self._check_minimum(0, "epochs", "warmup_epochs", "blr", "lr", "min_lr", "weight_decay", "num_workers", "seed")
        self._check_unit("hflip", "max_bad_images")
        if not self.output_dir.strip():
            raise ValueError("--output_dir '': every run saves a checkpoint; name its folder, such as ./output_dir")
        for name in ("input_size", "patch_size"):
            if len(getattr(self, name)) > 2 or any(side < 1 for side in getattr(self, name)):
                raise ValueError(f"--{name} {getattr(self, name)}: give one side or height and width, in pixels")
        if self.seed >= 2**63:
            raise ValueError(f"--seed {self.seed}: must be below 2^63")
        if self.clip_grad is not None and self.clip_grad <= 0:
            raise ValueError(f"--clip_grad {self.clip_grad}: must be above 0; leave it out for no clipping")
        self.resolved_accum_iter(world.launched_world_size())

    def _check_minimum(self, minimum: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not value >= minimum:
                raise ValueError(f"--{name} {value}: must be at least {minimum}")

    def _check_unit(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be between 0 and 1")

    def resolved_accum_iter(self, world_size: int) -> int:
        """Micro-batches per step: from `effective_batch_size` where it is given. ValueError if it does not divide."""
        effective, micro = self.effective_batch_size, self.batch_size * world_size
        if effective is None:
            return self.accum_iter or 1
        if self.accum_iter is not None and self.accum_iter * micro != effective:
            raise ValueError(
                f"--effective_batch_size {effective}: --batch_size {self.batch_size} x --accum_iter {self.accum_iter} "
                f"x {world_size} process(es) makes {self.accum_iter * micro}; leave one of the three out"
            )
        if effective % micro:
            raise ValueError(
                f"--effective_batch_size {effective}: not a multiple of --batch_size {self.batch_size} x {world_size} "
                f"process(es) = {micro}; choose a --batch_size that divides it"
                + _divisor_hint(effective, world_size, self.batch_size)
            )
        return effective // micro

    def resolved_effective_batch_size(self, world_size: int) -> int:
        """Images of one optimizer step, over all processes and micro-batches."""
        return self.batch_size * self.resolved_accum_iter(world_size) * world_size

    def resolved_lr(self, world_size: int) -> float:
        """Peak learning rate: `lr`, else blr * effective batch / 256."""
        if self.lr is not None:
            return self.lr
        return self.blr * self.batch_size * self.resolved_accum_iter(world_size) * world_size / 256

    def size(self, name: str) -> tuple[int, int] | None:
        """`input_size` or `patch_size` as (height, width); None where the model's own is meant."""
        value = getattr(self, name)
        return (value[0], value[-1]) if value else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values only, for checkpoints and config.yaml."""
        return dataclasses.asdict(self)


def _divisor_hint(effective: int, world_size: int, batch_size: int) -> str:
    if effective % world_size:
        return f" (and a number of processes that divides {effective})"
    share = effective // world_size
    return f", such as {max(d for d in range(1, min(batch_size, share) + 1) if share % d == 0)}"


@dataclass
class PretrainSettings(Settings):
    """Settings of `main_pretrain.py`."""

    model: str = option("mae_vit_large_patch16", "name of the architecture, see models_mae.py")
    mask_ratio: float = option(0.75, "share of patches removed; under sbam_amr the base ratio")
    masking: str = option("random", "random, sbam, sbam_amr, or your own as package.module:Class")
    masking_args: list[str] = option([], "the strategy's own options as name=value, such as delta_r=0.15")
    masking_warmup_epochs: int = option(0, "epochs of random masking before --masking begins")
    norm_pix_loss: bool = option(False, "predict patches normalised by their own mean and deviation")
    crop_scale: list[float] = option([0.2, 1.0], "range of the random crop's area over the image's")
    exact_resize: bool = option(False, "crops bit for bit as torchvision makes them of PIL images; slower")
    loader: str | None = option(None, "package.module:function, path -> array (H, W, C), for any channels and depth")
    finetune: str | None = option(None, "checkpoint whose weights to start from, with a new optimizer and schedule")
    # What only shows it
    eval_every: int | None = option(None, "epochs between two looks at k-NN accuracy, effective rank and salience")
    vis_every: int | None = option(None, "epochs between two pictures of masks and reconstructions, for TensorBoard")

    def check(self) -> None:
        """As `Settings.check`, and what only pre-training has."""
        super().check()
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"--mask_ratio {self.mask_ratio}: must be between 0 and 1, both excluded")
        self._check_minimum(0, "masking_warmup_epochs")
        self._check_minimum(1, "eval_every", "vis_every")
        for name in ("exact_resize", "eval_every", "vis_every"):
            if getattr(self, name) and self.loader is not None:
                raise ValueError(
                    f"--{name}: resizes with Pillow, which cannot take the arrays of --loader {self.loader}; drop one"
                )
            if getattr(self, name) and self.in_chans not in (1, 3, 4):
                raise ValueError(
                    f"--{name}: resizes with Pillow, which takes 1, 3 or 4 channels, not --in_chans {self.in_chans}; "
                    "drop one"
                )
        check_crop_scale(self.crop_scale)


def check_crop_scale(scale: list[float]) -> None:
    """ValueError unless `scale` is a range within (0, 1]."""
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"--crop_scale {scale}: give two numbers, the smallest and the largest area, in (0, 1]")


@dataclass
class SupervisedSettings(Settings):
    """What fine-tuning and linear probing share."""

    finetune: str | None = option(None, "pre-trained checkpoint to start from")
    nb_classes: int | None = option(None, "number of classes; default: the class folders of the training pictures")
    global_pool: bool | None = option(None, "classify the mean of the patch tokens")
    cls_token: bool = option(False, "classify the class token: the opposite of --global_pool")
    crop_pct: float | None = option(None, "evaluation: centre crop over resized side; default: 0.875 up to 224 pixels")
    crop_scale: list[float] = option([0.08, 1.0], "range of the random crop's area over the image's")
    eval: bool = option(False, "only evaluate; needs --resume or --finetune")
    dist_eval: bool = option(True, "share the validation images out over the processes; each is counted once")
    save_every_epochs: int | None = option(None, "epochs between two checkpoints that are kept; default: only the last")

    _pools_by_default: ClassVar[bool] = True

    @property
    def pools(self) -> bool:
        """True for global pooling, False for the class token; fine-tuning pools by default, probing does not."""
        return self._pools_by_default and not self.cls_token if self.global_pool is None else self.global_pool

    def check(self) -> None:
        """As `Settings.check`, and what fine-tuning and probing share."""
        super().check()
        if self.global_pool and self.cls_token:
            raise ValueError("--global_pool and --cls_token: choose one of them")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"--crop_pct {self.crop_pct}: must be above 0 and at most 1")
        self._check_minimum(2, "nb_classes")
        check_crop_scale(self.crop_scale)


@dataclass
class FinetuneSettings(SupervisedSettings):
    """Settings of `main_finetune.py`."""

    model: str = option("vit_large_patch16", "name of the architecture, see models_vit.py")
    epochs: int = option(50, "length of the schedule")
    warmup_epochs: float = option(5, "epochs of linear warm-up of the learning rate")
    min_lr: float = option(1e-6, "learning rate at the end of the schedule, times each layer's scale")
    layer_decay: float = option(0.75, "factor of the learning rate from each layer to the one below")
    drop_path: float = option(0.1, "stochastic depth rate of the last block")
    color_jitter: float | None = option(None, "colour jitter, only without --aa")
    aa: str | None = option("rand-m9-mstd0.5-inc1", "timm's AutoAugment policy; null for none")
    smoothing: float = option(0.1, "label smoothing")
    reprob: float = option(0.25, "probability of random erasing")
    remode: Literal["const", "rand", "pixel"] = option("pixel", "what random erasing fills in")
    recount: int = option(1, "number of erased boxes")
    mixup: float = option(0.0, "alpha of mixup; 0 for none")
    cutmix: float = option(0.0, "alpha of cutmix; 0 for none")
    cutmix_minmax: list[float] = option([], "smallest and largest side of the cutmix box, overrides --cutmix")
    mixup_prob: float = option(1.0, "probability of mixup or cutmix")
    mixup_switch_prob: float = option(0.5, "probability of cutmix where both are on")
    mixup_mode: Literal["batch", "pair", "elem"] = option("batch", "mixup per batch, pair or element")

    @property
    def mixes(self) -> bool:
        """True where mixup or cutmix is on."""
        return self.mixup > 0 or self.cutmix > 0 or bool(self.cutmix_minmax)

    def check(self) -> None:
        """As `SupervisedSettings.check`, and what only fine-tuning has."""
        super().check()
        self._check_unit("drop_path", "smoothing", "reprob", "mixup_prob", "mixup_switch_prob")
        self._check_minimum(0, "mixup", "cutmix")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"--layer_decay {self.layer_decay}: must be above 0 and at most 1")
        if len(self.cutmix_minmax) not in (0, 2):
            raise ValueError(f"--cutmix_minmax {self.cutmix_minmax}: give two numbers, smallest and largest side")
        if self.aa and self.in_chans not in (1, 3):
            raise ValueError(f"--in_chans {self.in_chans}: --aa needs 1 or 3 channels; turn it off with --aa null")
        if self.color_jitter and self.in_chans not in (1, 3):
            raise ValueError(f"--in_chans {self.in_chans}: --color_jitter needs 1 or 3 channels; leave it out")
        if self.mixes and self.batch_size % 2:
            raise ValueError(f"--batch_size {self.batch_size}: must be even, because mixup and cutmix pair the images")


@dataclass
class LinprobeSettings(SupervisedSettings):
    """Settings of `main_linprobe.py`."""

    model: str = option("vit_large_patch16", "name of the architecture, see models_vit.py")
    batch_size: int = option(512, "images per process and micro-batch")
    epochs: int = option(90, "length of the schedule")
    warmup_epochs: float = option(10, "epochs of linear warm-up of the learning rate")
    blr: float = option(0.1, "base learning rate: lr = blr * effective batch / 256")
    weight_decay: float = option(0.0, "weight decay of LARS")

    _pools_by_default: ClassVar[bool] = False

    def check(self) -> None:
        """As `SupervisedSettings.check`; BatchNorm needs two images."""
        super().check()
        self._check_minimum(2, "batch_size")
