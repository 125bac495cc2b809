"""One epoch of training, for any method; fine-tuning and probing are methods too."""

from __future__ import annotations

from methods import Method
from util.training.epoch import Job
from util.training.step import GradientStep, train_step


def train_one_epoch(method: Method, job: Job, update: GradientStep, epoch: int) -> dict[str, float]:
    """Train for the steps that are left of one epoch.

    Args:
        method: what is trained, the bare one.
        job: gives the steps.
        update: accumulates gradients and steps.
        epoch: 0-based.

    Returns:
        Means over the epoch and all processes: loss (and each term, of several), lr, grad_norm, mask_ratio and
        kept_tokens (also _min and _max), and what the method and the masking strategy report.
    """
    method.train()
    context = job.context
    for step in job.steps(epoch):  # data, seed, schedules, and what the processes agree on come before
        batches = [method.inputs(batch, context.settings.seed, context.device) for batch in step.micro_batches]
        outcome = train_step(method, batches, step.at, update, step.averages, context.amp)
        step.done(outcome)
    method.after_epoch(job.after(epoch), job.whole_set(epoch))
    return job.means()
