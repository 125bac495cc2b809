#!/usr/bin/env python3
"""A main under torchrun in a SLURM job: `slurm_worker.py main_pretrain.py ...`. Asked to stop, it queues the job again.

Started by scripts/slurm.sbatch.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.distributed import slurm

if __name__ == "__main__":
    with slurm.requeued():
        importlib.import_module(Path(sys.argv[1]).stem).main(sys.argv[2:])
