"""A run at Weights & Biases. Whatever becomes of it there, the training goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from util.files import write_whole
from util.training.record import warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ID_FILE = "wandb_id.txt"


class WandbRun:
    """Points of a run at Weights & Biases.

    The point's own `step` is the horizontal axis: W&B's may never go back, as a run that continues does.

    Args:
        project: where the run is shown; WANDB_ENTITY says whose it is.
        output_dir: of the run, which is shown under its name; its id is kept in there.
        folder: where W&B puts its files.
        config: settings to show.
        continues: whether it is the run of before, if that had an id.

    Raises:
        ValueError: W&B does not take it, as without a login.
    """

    def __init__(self, project: str, output_dir: Path, folder: Path, config: dict[str, Any], continues: bool):
        import wandb  # two seconds, which runs without it need not wait for

        self._wandb, self._warned = wandb, False
        known = output_dir / ID_FILE
        number = known.read_text().strip() if continues and known.is_file() else None  # W&B draws one
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")  # a job that is stopped cannot wait for a lost network
        try:
            self._run = wandb.init(
                project=project,
                id=number,
                name=output_dir.resolve().name,
                dir=folder,
                config=config,
                resume="allow",
                allow_val_change=True,
                reinit="create_new",  # in a notebook or a test an earlier run may still be there
                settings=wandb.Settings(console="off"),
            )
        except Exception as error:  # of many classes: no login, no network, an id or a mode that it does not know
            raise ValueError(
                f"--wandb {project}: W&B does not take the run ({error}); "
                "run `wandb login`, or set WANDB_MODE=offline and upload it later with `wandb sync`"
            ) from error
        self._run.define_metric("*", step_metric="step")
        write_whole(known, f"{self._run.id}\n")

    def log(self, values: dict[str, float | torch.Tensor | Figure], step: int) -> None:
        """Add numbers, histograms of tensors, and figures at a step."""
        self._try(lambda: self._run.log({name: self._shown(value) for name, value in values.items()} | {"step": step}))

    def finish(self, status: int) -> None:
        """Wait until all is written, or uploaded; `status` is the exit status that is shown."""
        self._try(lambda: self._run.finish(exit_code=status))

    def _shown(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._wandb.Histogram(value.float().cpu().numpy())
        if isinstance(value, (int, float)):
            return value
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(value)
        canvas.draw()
        return self._wandb.Image(np.asarray(canvas.buffer_rgba()))

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # its process may be gone, or its disk full
            if not self._warned:
                warn(f"--wandb: points do not reach W&B ({error}); training goes on")
            self._warned = True
