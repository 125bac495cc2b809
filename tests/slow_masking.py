"""Random masking that takes its time in a job's first run, so that a tiny run can be interrupted."""

from __future__ import annotations

import os
import time

import masking


class Slow:
    """`random`, after `seconds` of sleep; without sleep once SLURM has started the job again."""

    def __init__(self, mask_ratio: float = 0.75, seconds: float = 0.0):
        self._random = masking.create("random", mask_ratio=mask_ratio)
        self._seconds = 0.0 if "SLURM_RESTART_COUNT" in os.environ else seconds

    def __call__(self, tokens, noise=None):
        time.sleep(self._seconds)
        return self._random(tokens, noise=noise)
