"""`scripts/benchmark.py train` and `growth`: what a training step costs, against peers and against itself."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable

import torch

import masking
from benchmarks import report
from benchmarks.contenders import Contender, Ours, SpreadCounts, hugging_face, plain_mae
from benchmarks.measure import matmul_peak, peak_memory, training_flops
from benchmarks.timing import CLOCKS, Spread, add_clock_flag, interleave, ratio, short
from util import cli, precision

MODELS = {"base": "mae_vit_base_patch16", "large": "mae_vit_large_patch16", "small": "mae_vit_small_patch16"}
REFERENCE = "random"


def main(argv: list[str]) -> None:
    """Time the steps of every model asked for, interleaved."""
    arguments = parse(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    amp = precision.resolve_amp(arguments.amp, device)
    content = {"environment": report.environment(), "amp": amp, "clock": arguments.clock, "models": {}}
    print(report.table([content["environment"]]))
    dtype = precision.AMP_DTYPES[amp] or torch.float32
    content["matmul_peak_tflops"] = matmul_peak(device, dtype, CLOCKS[arguments.clock]) / 1e12
    print(f"\nlarge matrix product, {dtype}: {content['matmul_peak_tflops']:.4g} TFLOP/s\n")
    for name in arguments.models:
        for compiled in (False, True) if arguments.compile else (False,):
            title = f"{name}, {'compiled' if compiled else 'eager'}"
            torch.compiler.reset()  # the shapes of all models together would pass the limit of graphs
            content["models"][title] = compare(title, arguments, device, amp, compiled, content["matmul_peak_tflops"])
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if arguments.json:
                report.write_json(arguments.json, content)  # after every model: nothing is lost if a later one fails


def parser_of(what: Callable) -> argparse.ArgumentParser:
    """Return the flags that `train` and `growth` share."""
    name = "train" if what is main else what.__name__
    parser = argparse.ArgumentParser(prog=f"scripts/benchmark.py {name}", description=what.__doc__)
    add_device_flags(parser)
    parser.add_argument("--batch_size", type=int, help="default: 16 on the CPU, as many as fit up to 512 on a GPU")
    parser.add_argument("--repeats", type=int, default=3 if torch.cuda.is_available() else 1, help="steps in one turn")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the flags of `train`."""
    parser, gpu = parser_of(main), torch.cuda.is_available()
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=["base", "large"] if gpu else ["base"])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=gpu, help="also with torch.compile")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="only these lines of the table, and random")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="also other codes' steps")
    return parser.parse_args(argv)


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that all timings share."""
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if gpu else "cpu")
    parser.add_argument("--amp", choices=("bf16", "fp16", "none"), help="default: bf16 on a GPU, none on the CPU")
    parser.add_argument("--rounds", type=int, default=10 if gpu else 5, help="times every contender has its turn")
    add_clock_flag(parser)
    parser.add_argument("--json", type=cli.path_text, help="file for the numbers")


def compare(
    title: str, arguments: argparse.Namespace, device: torch.device, amp: str, compiled: bool, peak_tflops: float
) -> dict:
    """Time all contenders of one model and print their table."""
    name = MODELS[title.split(",")[0]]
    ours = Ours(name, device, amp, compiled=compiled)
    batch_size = arguments.batch_size or fitting_batch(ours, device)
    images = torch.randn(batch_size, 3, 224, 224, device=device)
    contenders = _ours(ours, images) | _packing(name, images, amp, compiled)
    if arguments.peers:
        contenders |= _peers(name, ours, images, amp)
    with torch.no_grad():
        tokens = ours.model.embed(images)
    if arguments.contenders:
        contenders = {
            label: c for label, c in contenders.items() if label in ("random", "fixed", *arguments.contenders)
        }
    calls = {label: contender.step for label, contender in contenders.items()}
    calls["salience alone"] = lambda: masking.token_salience(tokens)
    seconds = interleave(
        calls,
        arguments.rounds,
        warmup=2 if device.type == "cuda" else 1,
        repeats=arguments.repeats,
        clock=CLOCKS[arguments.clock],
    )
    rows = [_row(label, contender, seconds, ours, batch_size, peak_tflops) for label, contender in contenders.items()]
    share = ratio(seconds, "salience alone", REFERENCE)
    rows.append({"step": "salience alone", "ms": _milliseconds(seconds["salience alone"]), "time": share.format()})
    print(f"\n## {title}, {batch_size} images, {amp}, {arguments.rounds} rounds\n\n{report.table(rows)}\n", flush=True)
    print("time: times the step of random; of spread ones that of fixed; of a decoded part that of its own strategy")
    return {"batch_size": batch_size, "rows": rows, "seconds": seconds}


def _ours(ours: Ours, images: torch.Tensor) -> dict[str, Contender]:
    found = {name: ours.contender(images, masking.create(name)) for name in ("random", "sbam", "sbam_amr")}
    for share in (0.5, 0.25):
        found[f"random, decode {share}"] = ours.contender(images, masking.create("random"), decode_ratio=share)
    found["sbam_amr, decode 0.5"] = ours.contender(images, masking.create("sbam_amr"), decode_ratio=0.5)
    return found


def _packing(name: str, images: torch.Tensor, amp: str, compiled: bool) -> dict[str, Contender]:
    """Return contenders with equal totals of tokens: one number for all, spread numbers packed, the same padded."""
    model = Ours(name, images.device, amp, compiled=compiled)
    padded = Ours(name, images.device, amp, compiled=compiled, padded=True)
    return {
        "fixed": model.contender(images, masking.create("random")),
        "spread, packed": model.contender(images, SpreadCounts()),
        "spread, padded": padded.contender(images, SpreadCounts()),
    }


def _peers(name: str, ours: Ours, images: torch.Tensor, amp: str) -> dict[str, Contender]:
    found = {"plain MAE": plain_mae(name, images)}
    try:
        found["Hugging Face"] = hugging_face(ours.model, images, amp)
    except ImportError:
        print("transformers is not installed: no comparison with Hugging Face (pip install transformers)")
    return found


def _row(
    label: str, contender: Contender, seconds: dict, ours: Ours, batch_size: int, peak_tflops: float
) -> dict[str, str]:
    lengths = contender.keep_lengths or [masking.keep_count(ours.model.num_patches, 0.75)] * batch_size
    time = Spread.of(seconds[label])
    tflops = training_flops(ours.model, lengths, contender.decode_lengths) / time.median / 1e12
    reference = "fixed" if label.startswith("spread") else "sbam_amr" if label.startswith("sbam_amr,") else REFERENCE
    return {
        "step": label,
        "images/s": short(batch_size / time.median),
        "ms": _milliseconds(seconds[label]),
        "time": ratio(seconds, label, reference).format(),
        "kept patches": f"{min(lengths)}..{max(lengths)}" if len(set(lengths)) > 1 else str(lengths[0]),
        "TFLOP/s": short(tflops),
        "of peak": f"{tflops / peak_tflops:.1%}",
        "memory GB": short(peak_memory(contender.step, contender.tensors()) / 1e9),
    }


def _milliseconds(seconds: list[float]) -> str:
    return Spread.of([1000 * value for value in seconds]).format()


def fitting_batch(ours: Ours, device: torch.device, limit: int = 512) -> int:
    """Return 16 on the CPU; on a GPU as many images as every contender can take, up to `limit`."""
    if device.type == "cpu":
        return 16
    images = torch.randn(32, 3, 224, 224, device=device)
    contender = ours.contender(images, masking.create("sbam"))
    with torch.compiler.set_stance("force_eager"):  # needs more memory, and no graphs of 32 images
        contender.step()
        per_image = (peak_memory(contender.step, contender.tensors()) - ours_bytes(contender)) / 32
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return largest_batch(free, per_image, ours_bytes(contender), limit)


def largest_batch(free: float, per_image: float, model: float, limit: int) -> int:
    """Return the largest power of two, from 32 up to `limit`, of images for which all contenders fit.

    Four more models come into the free memory, and an image of a plain MAE needs up to twice the memory of ours.

    Args:
        free, per_image, model: bytes: free now, of one image in a step of ours, of a model and its optimizer's state.
        limit: see above.
    """
    batch = 32
    while 2 * batch <= limit and 4 * model + 2 * batch * 2 * per_image < 0.9 * free:
        batch *= 2
    return batch


def ours_bytes(contender: Contender) -> int:
    """Return the bytes of parameters and optimizer state."""
    return sum(tensor.numel() * tensor.element_size() for tensor in contender.tensors())


def growth(argv: list[str]) -> None:
    """Time how an eager step grows with the batch, the image and the mask ratio."""
    parser = parser_of(growth)
    parser.add_argument("--models", choices=sorted(MODELS), default="base", help="one of them")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    amp = precision.resolve_amp(arguments.amp, device)
    name = MODELS[arguments.models]
    largest = arguments.batch_size or fitting_batch(Ours(name, device, amp), device)
    sizes = [largest // 2**i for i in range(largest.bit_length())][::-1]
    content = {"environment": report.environment(), "amp": amp, "model": name}
    print(report.table([content["environment"]]))
    content["batch"] = _grow("batch", sizes, lambda n: (name, n, 224, 0.75), arguments, device, amp)
    few = max(1, largest // 4)
    content["image"] = _grow("image", [224, 288, 384, 448], lambda n: (name, few, n, 0.75), arguments, device, amp)
    content["ratio"] = _grow(
        "ratio", [0.5, 0.6, 0.7, 0.8, 0.9], lambda r: (name, largest, 224, r), arguments, device, amp
    )
    if arguments.json:
        report.write_json(arguments.json, content)


def _grow(
    label: str, values: list, case: Callable, arguments: argparse.Namespace, device: torch.device, amp: str
) -> list[dict]:
    """Time `random` and `sbam_amr` at each value, interleaved over the values."""
    calls, counts = {}, {}
    for value in values:
        name, batch_size, img_size, mask_ratio = case(value)
        ours = Ours(name, device, amp, img_size=img_size)
        images = torch.randn(batch_size, 3, img_size, img_size, device=device)
        for strategy in ("random", "sbam_amr"):
            options = {"delta_r": min(0.15, round(0.99 - mask_ratio, 2))} if strategy == "sbam_amr" else {}
            contender = ours.contender(images, masking.create(strategy, mask_ratio=mask_ratio, **options))
            calls[strategy, value], counts[value] = contender.step, batch_size
    seconds = interleave(calls, arguments.rounds, warmup=1, repeats=arguments.repeats, clock=CLOCKS[arguments.clock])
    rows = []
    for value in values:
        row = {label: value, "images": counts[value]}
        for strategy in ("random", "sbam_amr"):
            row[f"{strategy}, ms per image"] = Spread.of(
                [1000 * t / counts[value] for t in seconds[strategy, value]]
            ).format()
        rows.append(row)
    print(f"\n{report.table(rows)}\n", flush=True)
    return rows
