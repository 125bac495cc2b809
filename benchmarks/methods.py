"""`scripts/benchmark.py methods`: what a step of each method costs, against MAE's with the same encoder."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import masking
import methods
import models_mae
from benchmarks import report
from benchmarks.contenders import SpreadCounts
from benchmarks.measure import matmul_peak, optimizer_tensors, peak_memory
from benchmarks.plain_ibot import PlainIBOT
from benchmarks.timing import CLOCKS, Spread, interleave, ratio, short
from benchmarks.training import add_device_flags
from methods import At, Inputs
from util import optim, precision
from util.data import transforms
from util.training.averages import Averages
from util.training.step import GradientStep, train_step

MODELS = {"mae": "mae", "hpm": "mae", "cmae": "mae", "simmim": "simmim", "bootmae": "bootmae", "ibot": "ibot"}
REFERENCE = "mae, random"
PLAIN = "ibot, plain"  # random masking, every view by itself, the heads on all tokens
OPTIONS = {  # what a small model needs
    ("cmae", "mini"): {"feature_depth": 1},
    ("ibot", "mini"): {"local_size": 8, "out_dim": 64, "hidden_dim": 64, "bottleneck_dim": 32},
}


class MethodStep:
    """The training step of a method, on images that are on the device already; strategies share one model.

    Args:
        name: of the method, or `PLAIN`.
        size: base or mini, of its model.
        images: (N, 3, H, W).
        amp: bf16, fp16 or none.
        compiled: whether to compile the method's parts, as `main_pretrain.py --compile` does.
    """

    def __init__(self, name: str, size: str, images: torch.Tensor, amp: str, compiled: bool = False):
        torch.manual_seed(0)
        suffix, short_name = {"base": "vit_base_patch16", "mini": "vit_mini_patch4"}[size], name.split(",")[0]
        options = {} if short_name in ("simmim", "ibot") else {"norm_pix_loss": True}
        model = models_mae.create_model(f"{MODELS[short_name]}_{suffix}", **options).to(images.device)
        given = OPTIONS.get((short_name, size), {})
        create = PlainIBOT if name == PLAIN else partial(methods.create, name)
        self.method = create(model=model, strategy=masking.create("random"), **given).to(images.device)
        self.method.amp = self.amp = amp
        if compiled:
            self.method.set_normalize(transforms.Normalize(0.0, 1.0))
            self.method.compile_parts()
        self.images, self.averages = images, Averages(images.device)
        self.inputs = _inputs(self.method, images)
        optimizer = optim.pretrain_adamw(self.method.parameter_groups(0.05), images.device, self.method.betas)
        for group in optimizer.param_groups:
            group["lr"] = 1e-6
        self.update = GradientStep(self.method, optimizer, precision.grad_scaler(amp, images.device))

    def with_strategy(self, strategy: masking.base.Strategy) -> Callable[[], None]:
        """Return the step with `strategy`."""

        def step() -> None:
            object.__setattr__(self.method, "strategy", strategy)
            train_step(self.method, [self.inputs], At(0, 0.0, 1), self.update, self.averages, self.amp)

        return step

    def tensors(self) -> list[torch.Tensor]:
        """Return what stays in memory between steps."""
        return optimizer_tensors(self.method, self.update.optimizer)


def _inputs(method: methods.Method, images: torch.Tensor) -> Inputs:
    """Return two views of `images` (N, 3, H, W); for iBOT also local ones, and ratios: half of the views stay whole."""
    if not isinstance(method, methods.IBOT):
        return Inputs([images, images])
    local, number = images[:, :, : method.local_size, : method.local_size], len(images)
    noise = torch.rand(2 * number, method.model.num_patches, device=images.device)
    views = [images, images, *[local] * method.local_number]
    return Inputs(views, noise, ratios=masking.Ratios((0.0, 0.3) * number, 0.3))


def main(argv: list[str]) -> None:
    """Time a step of every method with random masking, SBAM, and numbers of patches that differ, interleaved."""
    parser = argparse.ArgumentParser(prog="scripts/benchmark.py methods", description=main.__doc__)
    add_device_flags(parser)
    parser.add_argument("--model", choices=("base", "mini"), default="base")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--compile", action="store_true", help="compile each method's step, MAE's of comparison too")
    parser.add_argument("--methods", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    amp = precision.resolve_amp(arguments.amp, device)
    side = 224 if arguments.model == "base" else 16
    images = torch.randn(arguments.batch_size, 3, side, side, device=device)
    names = dict.fromkeys(["mae", *arguments.methods, *([PLAIN] if "ibot" in arguments.methods else [])])
    steps = {name: MethodStep(name, arguments.model, images, amp, arguments.compile) for name in names}
    strategies = {"random": masking.create("random"), "sbam": masking.create("sbam"), "spread": SpreadCounts()}
    contenders = {f"{n}, {s}": (step, strategies[s]) for n, step in steps.items() if n != PLAIN for s in strategies}
    if PLAIN in steps:
        del contenders["ibot, spread"]  # its numbers differ anyway
        contenders[PLAIN] = steps[PLAIN], strategies["random"]
    calls = {label: step.with_strategy(strategy) for label, (step, strategy) in contenders.items()}
    clock = CLOCKS[arguments.clock]
    peak = matmul_peak(device, precision.AMP_DTYPES[amp] or torch.float32, clock)
    seconds = interleave(calls, arguments.rounds, warmup=1, clock=clock)
    rows = [row(label, call, seconds, contenders[label][0], peak) for label, call in calls.items()]
    content = {
        "environment": report.environment(),
        "batch_size": arguments.batch_size,
        "compiled": arguments.compile,
        "rows": rows,
        "seconds": seconds,
    }
    print(f"{report.table([content['environment']])}\n\n{report.table(rows)}", flush=True)
    print(
        f"large matrix product: {peak / 1e12:.4g} TFLOP/s; time: times the step of {REFERENCE}; own: of its own random"
    )
    if arguments.json:
        report.write_json(arguments.json, content)


def row(label: str, call: Callable[[], None], seconds: dict, step: MethodStep, peak: float) -> dict[str, str]:
    """Describe one contender. Operations are counted in one eager step, without those of packed attention on a CPU."""
    eager = torch.compiler.set_stance("force_eager")  # a compiled function would hide its operations
    with eager, FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    number, time = len(step.images), Spread.of(seconds[label])
    return {
        "step": label,
        "images/s": short(number / time.median),
        "ms": Spread.of([1000 * value for value in seconds[label]]).format(),
        "time": ratio(seconds, label, REFERENCE).format(),
        "own": ratio(seconds, label, f"{label.split(',')[0]}, random").format(),
        "GFLOP/image": short(counter.get_total_flops() / number / 1e9),
        "of peak": f"{counter.get_total_flops() / time.median / peak:.1%}",
        "memory GB": short(peak_memory(call, step.tensors()) / 1e9),
    }
