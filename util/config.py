"""The settings of the three tasks, with MAE's names. What they mean stands in `help`, once, for users and readers."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from util import extras
from util.distributed import world
from util.ratios import exact_ratio

# The kinds of settings, in the order in which `--help` and `--print_config` show them. A run of which only settings of
# the last two kinds change gives the same result, up to rounding.
KINDS = {
    "result": "What changes the result",
    "speed": "What only makes it fast",
    "display": "What only shows it: logs, checkpoints, and when a run gives up",
}


def option(
    kind: str, default: Any, help: str, *, path: bool = False, pairs: bool = False, replaces: tuple[str, ...] = ()
) -> Any:
    """Return a dataclass field of one of the `KINDS`.

    Args:
        kind: a key of `KINDS`.
        default: a list is copied for every instance.
        help: what `--help` says.
        path: the value is a path, whose `~` is expanded.
        pairs: the value is a list of name=value; the command line changes single entries of a file's.
        replaces: the settings that say the same in another way: where the command line gives this one, a file's value
            of them is dropped.
    """
    metadata = {"kind": kind, "help": help, "path": path, "pairs": pairs, "replaces": replaces}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


result, speed, display = (functools.partial(option, kind) for kind in KINDS)


@dataclass
class Settings:
    """What all three tasks share."""

    model: str = result("", "name of the architecture")
    input_size: list[int] = result([], "image side in pixels, or height and width; default: the model's own")
    patch_size: list[int] = result([], "patch side in pixels, or height and width; default: the model's own")
    in_chans: int = result(3, "channels of the images: 1 grey, 3 RGB, 4 RGBA; others with --loader or wds")
    dataset: str = result("folder", "folder, wds, hfds/NAME, torch/NAME, or digits (built in); see docs/DATA.md")
    data_path: str | None = result(
        None, "folder with train/<class>/ and val/<class>/; pre-training takes any pictures", path=True
    )
    mean: list[float] = result([], "mean of each channel, of 0..1; default: ImageNet's for RGB, else 0.5")
    std: list[float] = result([], "deviation of each channel; default: ImageNet's for RGB, else 0.5")
    hflip: float = result(0.5, "probability of a horizontal flip")
    batch_size: int = result(64, "images per process and micro-batch")
    accum_iter: int | None = result(None, "micro-batches per optimizer step; follows from --effective_batch_size")
    effective_batch_size: int | None = result(None, "images per optimizer step over all processes and micro-batches")
    epochs: int = result(400, "length of the schedule")
    warmup_epochs: float = result(40, "epochs of linear warm-up of the learning rate")
    blr: float = result(1e-3, "base learning rate: lr = blr * effective batch / 256", replaces=("lr", "blrs"))
    lr: float | None = result(None, "learning rate, overrides --blr", replaces=("blrs",))
    min_lr: float = result(0.0, "learning rate at the end of the schedule")
    weight_decay: float = result(0.05, "weight decay")
    clip_grad: float | None = result(None, "largest norm of the gradient; default: no clipping")
    amp: Literal["bf16", "fp16", "none"] | None = result(
        None, "autocast format; default: bf16 or fp16 on GPU, none on CPU"
    )
    seed: int = result(0, "of everything random")
    resume: str | None = result(
        None, "checkpoint of the same task to continue from, unless --output_dir has its own", path=True
    )
    device: Literal["cuda", "cpu"] | None = speed(None, "cuda or cpu; default: cuda where there is one")
    compile: bool = speed(False, "torch.compile the model")
    grad_checkpointing: bool = speed(False, "compute activations again in the backward pass: less memory, more time")
    channels_last: bool = speed(False, "store the patch embedding channels last; slower on a CPU")
    num_workers: int = speed(10, "loader processes per training process")
    pin_mem: bool = speed(True, "page-locked host memory, for faster copies to a GPU")
    output_dir: str = display("./output_dir", "folder for checkpoints, log.txt and config.yaml", path=True)
    log_dir: str | None = display(None, "folder for TensorBoard and W&B; default: --output_dir", path=True)
    wandb: str | None = display(None, "project at Weights & Biases to log to beside TensorBoard; needs wandb")
    print_freq: int = display(20, "optimizer steps between two lines of the log")
    save_every_epochs: int | None = display(
        20, "epochs between two checkpoints that are kept; null keeps only the last"
    )
    save_every_minutes: float = display(10, "minutes between two writings of checkpoint-last.pth within an epoch")
    keep_last: int | None = display(None, "how many checkpoint-{epoch}.pth stay; default: all")
    stop_after_epoch: int | None = display(
        None, "epoch (from 0) of the schedule after which the run ends; without it, the same command continues"
    )
    max_bad_images: float = display(0.001, "share of the pictures that may be undecodable; more stop the run")
    max_skipped_steps: int = display(10, "steps in a row that may be skipped because loss or gradient is not finite")
    dist_timeout: float = display(1800, "seconds after which a process that waits for the others gives up")

    def check(self) -> None:
        """Raise ValueError, in one sentence with flag, value and remedy, for values that cannot work in any task."""
        if not (self.output_dir or "").strip():
            raise ValueError(
                "--output_dir '': is empty; MAE then saves nothing, but a run here needs a folder to continue from: "
                "name one (such as $(mktemp -d), to throw away), or leave the flag out for ./output_dir"
            )
        self._check_minimum(1, "in_chans", "batch_size", "accum_iter", "effective_batch_size", "print_freq")
        self._check_minimum(1, "save_every_epochs", "keep_last", "dist_timeout")
        self._check_minimum(0, "save_every_minutes", "max_skipped_steps")
        self._check_minimum(0, "epochs", "warmup_epochs", "blr", "lr", "min_lr", "weight_decay", "num_workers", "seed")
        self._check_unit("hflip", "max_bad_images")
        if self.stop_after_epoch is not None and not 0 <= self.stop_after_epoch < self.epochs:
            raise ValueError(
                f"--stop_after_epoch {self.stop_after_epoch}: must be an epoch of the schedule, 0 to "
                f"{self.epochs - 1}; --epochs is the length of the schedule"
            )
        for name in ("input_size", "patch_size"):
            if len(getattr(self, name)) > 2 or any(side < 1 for side in getattr(self, name)):
                raise ValueError(f"--{name} {getattr(self, name)}: give one side or height and width, in pixels")
        if self.seed >= 2**63:
            raise ValueError(f"--seed {self.seed}: must be below 2^63")
        if self.clip_grad is not None and self.clip_grad <= 0:
            raise ValueError(f"--clip_grad {self.clip_grad}: must be above 0; leave it out for no clipping")
        if self.wandb is not None:
            self._check_wandb(self.wandb)
        self.resolved_accum_iter(world.launched_world_size())

    @staticmethod
    def _check_wandb(project: str) -> None:
        if not project or len(project) > 128 or any(letter in "/\\#?%:" for letter in project):
            raise ValueError(f"--wandb {project!r}: name a project, in 1 to 128 letters without / \\ # ? % :")
        extras.require("--wandb", "wandb")

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
        """Return micro-batches per step, from `effective_batch_size` if given. ValueError if it does not divide."""
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
        """Return the images of one optimizer step, over all processes and micro-batches."""
        return self.batch_size * self.resolved_accum_iter(world_size) * world_size

    def resolved_lr(self, world_size: int) -> float:
        """Return the peak learning rate: `lr`, else blr * effective batch / 256."""
        if self.lr is not None:
            return self.lr
        return self.blr * self.batch_size * self.resolved_accum_iter(world_size) * world_size / 256

    @property
    def last_epoch(self) -> int:
        """Return the last epoch that is trained, from 0; -1 if none is."""
        return self.epochs - 1 if self.stop_after_epoch is None else self.stop_after_epoch

    def size(self, name: str) -> tuple[int, int] | None:
        """Return `input_size` or `patch_size` as (height, width); None where the model's own is meant."""
        value = getattr(self, name)
        return (value[0], value[-1]) if value else None

    def as_dict(self) -> dict[str, Any]:
        """Return the values by name, plain ones only, for checkpoints and config.yaml."""
        values = dataclasses.asdict(self)
        return {name: values[name] for kind in KINDS for name in fields_of_kind(type(self), kind)}


def fields_of_kind(settings_class: type[Settings], *kinds: str) -> dict[str, dataclasses.Field]:
    """Return the fields of the given `KINDS` by name, in the order of their definition."""
    fields = {field.name: field for field in dataclasses.fields(settings_class)}
    return {name: field for name, field in fields.items() if field.metadata["kind"] in kinds}


def names_of_kind(settings_class: type[Settings], *kinds: str) -> set[str]:
    """Return the names of the settings of the given `KINDS`: `names_of_kind(PretrainSettings, "speed", "display")`."""
    return set(fields_of_kind(settings_class, *kinds))


def _divisor_hint(effective: int, world_size: int, batch_size: int) -> str:
    if effective % world_size:
        return f" (and a number of processes that divides {effective})"
    share = effective // world_size
    return f", such as {max(d for d in range(1, min(batch_size, share) + 1) if share % d == 0)}"


@dataclass
class PretrainSettings(Settings):
    """Settings of `main_pretrain.py`."""

    model: str = result("mae_vit_large_patch16", "name of the architecture: docs/PRETRAIN.md has them")
    method: str = result("mae", "mae, simmim, bootmae, cmae, hpm, ibot, or your own as package.module:Class")
    method_args: list[str] = result([], "the method's own options as name=value", pairs=True)
    mask_ratio: float | str = result(0.75, "share of patches removed, also as 32/49; under sbam_amr the base ratio")
    masking: str = result("random", "random, sbam, sbam_amr, others of docs/MASKING.md, yours as package.module:Class")
    masking_args: list[str] = result([], "the strategy's own options as name=value, such as delta_r=0.15", pairs=True)
    masking_warmup_epochs: int = result(0, "epochs of random masking before --masking begins")
    decode_ratio: float | str = result(1.0, "share of the removed patches that are predicted, drawn anew each step")
    norm_pix_loss: bool = result(False, "predict patches normalised by their own mean and deviation")
    crop_scale: list[float] = result([0.2, 1.0], "range of the random crop's area over the image's")
    exact_resize: bool = result(False, "crops bit for bit as torchvision makes them of PIL images; slower")
    loader: str | None = result(None, "package.module:function, path -> array (H, W, C), for any channels and depth")
    finetune: str | None = result(
        None, "weights to start from (MAE, DINO, timm, Hugging Face), with a new optimizer and schedule", path=True
    )
    eval_every: int | None = display(None, "epochs between two looks at k-NN accuracy, effective rank and salience")
    vis_every: int | None = display(None, "epochs between two pictures of masks and reconstructions, for TensorBoard")

    def check(self) -> None:
        """Check as `Settings.check`, and what only pre-training has."""
        super().check()
        if not 0 < exact_ratio(self.mask_ratio, "--mask_ratio") < 1:
            raise ValueError(f"--mask_ratio {self.mask_ratio}: must be between 0 and 1, both excluded")
        if not 0 < exact_ratio(self.decode_ratio, "--decode_ratio") <= 1:
            raise ValueError(f"--decode_ratio {self.decode_ratio}: must be above 0 and at most 1")
        self._check_minimum(0, "masking_warmup_epochs")
        self._check_minimum(1, "eval_every", "vis_every")
        for name in self.needs_pictures:
            if self.loader is not None:
                raise ValueError(
                    f"--{name}: resizes with Pillow, which cannot take the arrays of --loader {self.loader}; drop one"
                )
            if self.in_chans not in (1, 3, 4):
                raise ValueError(
                    f"--{name}: resizes with Pillow, which takes 1, 3 or 4 channels, not --in_chans {self.in_chans}; "
                    "drop one"
                )
        check_crop_scale(self.crop_scale)

    @property
    def needs_pictures(self) -> list[str]:
        """Return the given flags that work with PIL images."""
        return [name for name in ("exact_resize", "eval_every", "vis_every") if getattr(self, name)]


def check_crop_scale(scale: list[float]) -> None:
    """Raise ValueError unless `scale` is a range within (0, 1]."""
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"--crop_scale {scale}: give two numbers, the smallest and the largest area, in (0, 1]")


@dataclass
class SupervisedSettings(Settings):
    """What fine-tuning and linear probing share."""

    finetune: str | None = result(
        None, "pre-trained weights to start from (also MAE, DINO, timm, Hugging Face)", path=True
    )
    nb_classes: int | None = result(None, "number of classes; default: the class folders of the training pictures")
    global_pool: bool | None = result(
        None, "classify the mean of the patch tokens; the default of fine-tuning", replaces=("cls_token",)
    )
    cls_token: bool = result(
        False, "classify the class token instead; the default of linear probing", replaces=("global_pool",)
    )
    crop_pct: float | None = result(None, "evaluation: centre crop over resized side; default: 0.875 up to 224 pixels")
    crop_scale: list[float] = result([0.08, 1.0], "range of the random crop's area over the image's")
    eval: bool = result(False, "only evaluate: the checkpoint of --resume, else of --finetune, else the run's own")
    dist_eval: bool = speed(True, "share the validation images out over the processes; each is counted once")
    save_every_epochs: int | None = display(
        None, "epochs between two checkpoints that are kept; default: only the last"
    )

    _pools_by_default: ClassVar[bool] = True

    @property
    def heads(self) -> dict[str, float]:
        """Return name and base learning rate of each head, where several are trained at once; else nothing."""
        return {}

    @property
    def pools(self) -> bool:
        """Return True for global pooling, False for the class token; fine-tuning pools by default, probing does not."""
        return self._pools_by_default and not self.cls_token if self.global_pool is None else self.global_pool

    def check(self) -> None:
        """Check as `Settings.check`, and what fine-tuning and probing share."""
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

    model: str = result("vit_large_patch16", "name of the architecture, see models_vit.py")
    epochs: int = result(50, "length of the schedule")
    warmup_epochs: float = result(5, "epochs of linear warm-up of the learning rate")
    min_lr: float = result(1e-6, "learning rate at the end of the schedule, times each layer's scale")
    layer_decay: float = result(0.75, "factor of the learning rate from each layer to the one below")
    drop_path: float = result(0.1, "stochastic depth rate of the last block")
    color_jitter: float | None = result(None, "colour jitter, only without --aa")
    aa: str | None = result("rand-m9-mstd0.5-inc1", "timm's AutoAugment policy; null for none")
    smoothing: float = result(0.1, "label smoothing")
    reprob: float = result(0.25, "probability of random erasing")
    remode: Literal["const", "rand", "pixel"] = result("pixel", "what random erasing fills in")
    recount: int = result(1, "number of erased boxes")
    mixup: float = result(0.0, "alpha of mixup; 0 for none")
    cutmix: float = result(0.0, "alpha of cutmix; 0 for none")
    cutmix_minmax: list[float] = result([], "smallest and largest side of the cutmix box, overrides --cutmix")
    mixup_prob: float = result(1.0, "probability of mixup or cutmix")
    mixup_switch_prob: float = result(0.5, "probability of cutmix where both are on")
    mixup_mode: Literal["batch", "pair", "elem"] = result("batch", "mixup per batch, pair or element")

    @property
    def mixes(self) -> bool:
        """Return whether mixup or cutmix is on."""
        return self.mixup > 0 or self.cutmix > 0 or bool(self.cutmix_minmax)

    def check(self) -> None:
        """Check as `SupervisedSettings.check`, and what only fine-tuning has."""
        super().check()
        self._check_unit("drop_path", "smoothing", "reprob", "mixup_prob", "mixup_switch_prob")
        self._check_minimum(0, "mixup", "cutmix")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"--layer_decay {self.layer_decay}: must be above 0 and at most 1")
        if len(self.cutmix_minmax) not in (0, 2):
            raise ValueError(f"--cutmix_minmax {self.cutmix_minmax}: give two numbers, smallest and largest side")
        if self.cutmix_minmax and not 0 <= self.cutmix_minmax[0] < self.cutmix_minmax[1] <= 1:
            raise ValueError(f"--cutmix_minmax {self.cutmix_minmax}: must be two rising numbers in 0 to 1")
        if self.aa and self.in_chans not in (1, 3):
            raise ValueError(f"--in_chans {self.in_chans}: --aa needs 1 or 3 channels; turn it off with --aa null")
        if self.color_jitter and self.in_chans not in (1, 3):
            raise ValueError(f"--in_chans {self.in_chans}: --color_jitter needs 1 or 3 channels; leave it out")
        if self.mixes and self.batch_size % 2:
            raise ValueError(f"--batch_size {self.batch_size}: must be even, because mixup and cutmix pair the images")


@dataclass
class LinprobeSettings(SupervisedSettings):
    """Settings of `main_linprobe.py`."""

    model: str = result("vit_large_patch16", "name of the architecture, see models_vit.py")
    batch_size: int = result(512, "images per process and micro-batch")
    epochs: int = result(90, "length of the schedule")
    warmup_epochs: float = result(10, "epochs of linear warm-up of the learning rate")
    blr: float = result(0.1, "base learning rate: lr = blr * effective batch / 256", replaces=("lr", "blrs"))
    blrs: list[float] = result(
        [], "in place of --blr: base learning rates of several heads, trained at once", replaces=("lr",)
    )
    lr_per: Literal["step", "epoch"] = result("step", "whether the learning rate changes with each step or each epoch")
    optimizer: Literal["lars", "sgd"] = result("lars", "with momentum 0.9")
    weight_decay: float = result(0.0, "weight decay")
    crop: Literal["mae", "torchvision"] = result("mae", "random crop: MAE's own, bicubic, or torchvision's, bilinear")
    batch_norm: bool = result(True, "normalise the features over a micro-batch before the linear layer")
    probe_blocks: int | None = result(None, "probe the output of so many blocks of the encoder; default: all")
    last_blocks: int = result(1, "concatenate the class tokens of so many last blocks")
    append_mean: bool = result(False, "append the mean of the last block's patch tokens to the class token")

    _pools_by_default: ClassVar[bool] = False

    @property
    def heads(self) -> dict[str, float]:
        """Return name and base learning rate of each head of `blrs`."""
        return {f"blr_{rate:g}": rate for rate in self.blrs}

    def resolved_lr(self, world_size: int) -> float:
        """Return the peak learning rate; with `blrs` that of the head with the largest."""
        if not self.blrs:
            return super().resolved_lr(world_size)
        return max(self.blrs) * self.resolved_effective_batch_size(world_size) / 256

    def check(self) -> None:
        """Check as `SupervisedSettings.check`, and what only linear probing has."""
        super().check()
        self._check_minimum(2 if self.batch_norm else 1, "batch_size")  # the variance of one image is 0
        self._check_minimum(1, "probe_blocks", "last_blocks")
        if self.pools and (self.append_mean or self.last_blocks > 1):
            raise ValueError("--global_pool: --last_blocks and --append_mean are of the class token; use --cls_token")
        self._check_rates()

    def _check_rates(self) -> None:
        if any(rate <= 0 for rate in self.blrs):
            raise ValueError(f"--blrs {' '.join(map(str, self.blrs))}: every rate must be above 0")
        if len(self.heads) < len(self.blrs):
            raise ValueError(f"--blrs {' '.join(map(str, self.blrs))}: give each rate once")
        given = {"lr": self.lr is not None, "min_lr": self.min_lr > 0, "clip_grad": self.clip_grad is not None}
        for name in given:
            if self.blrs and given[name]:
                raise ValueError(
                    f"--{name} {getattr(self, name)}: does not go with --blrs, each of whose heads learns by itself; "
                    "drop one"
                )
