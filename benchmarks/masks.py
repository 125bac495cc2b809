"""`scripts/benchmark.py masks`: what choosing a mask costs, as a share of a training step."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

import masking
from benchmarks import report
from benchmarks.contenders import Ours
from benchmarks.timing import CLOCKS, Spread, interleave, ratio
from benchmarks.training import MODELS, REFERENCE, add_device_flags
from util import precision

CASES = {
    "random": {},
    "random, cell 2": {"cell": 2},
    "sbam": {},
    "sbam, cell 2": {"cell": 2},
    "sbam_amr": {},
    "block": {},
    "inverse_block": {},
    "color": {},
    "schedule": {"end": 0.5},
}


def main(argv: list[str]) -> None:
    """Time every strategy that reads no teacher on given tokens, beside a whole step with random masking."""
    parser = argparse.ArgumentParser(prog="scripts/benchmark.py masks", description=main.__doc__)
    add_device_flags(parser)
    parser.add_argument("--model", choices=sorted(MODELS), default="base")
    parser.add_argument("--batch_size", type=int, default=16)
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    ours = Ours(MODELS[arguments.model], device, precision.resolve_amp(arguments.amp, device))
    images = torch.randn(arguments.batch_size, 3, 224, 224, device=device)
    with torch.no_grad():
        tokens = ours.model.embed(images)
    calls = {REFERENCE: ours.contender(images, masking.create("random")).step}
    calls |= {f"{label}: mask": choose(label.split(",")[0], options, tokens) for label, options in CASES.items()}
    seconds = interleave(calls, arguments.rounds, warmup=1, clock=CLOCKS[arguments.clock])
    rows = [row(f"{label}: mask", seconds) for label in CASES]
    content = {"environment": report.environment(), "batch_size": arguments.batch_size, "rows": rows}
    print(f"{report.table([content['environment']])}\n\n{report.table(rows)}", flush=True)
    if arguments.json:
        report.write_json(arguments.json, content)


def choose(name: str, options: dict, tokens: torch.Tensor) -> Callable[[], masking.Mask]:
    """Return a call that masks `tokens` (N, L, D) on a square grid."""
    side = round(tokens.shape[1] ** 0.5)
    strategy, offered = masking.create(name, **options), {"grid": (side, side), "progress": 0.5, "draw": 0.5}
    return lambda: masking.call(strategy, tokens, torch.rand(tokens.shape[:2], device=tokens.device), **offered)


def row(label: str, seconds: dict[str, list[float]]) -> dict[str, str]:
    """Describe one strategy: milliseconds, and the share of a step in per cent."""
    share = ratio(seconds, label, REFERENCE)
    return {
        "strategy": label.removesuffix(": mask"),
        "ms": Spread.of([1000 * value for value in seconds[label]]).format(),
        "share of a step": f"{share.median:.3%} ({share.low:.3%}..{share.high:.3%})",
    }
