"""Random masking that takes its time, so that there is time to interrupt a tiny run."""

from __future__ import annotations

import time

import masking


class Slow:
    """`random`, after `seconds` of sleep."""

    def __init__(self, mask_ratio: float = 0.75, seconds: float = 0.1):
        self._random, self._seconds = masking.create("random", mask_ratio=mask_ratio), seconds

    def __call__(self, tokens, noise=None):
        time.sleep(self._seconds)
        return self._random(tokens, noise=noise)
