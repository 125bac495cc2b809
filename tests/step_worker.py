"""One optimizer step of every strategy on a fixed global batch of 12 images, with or without torchrun.

Run by test_distributed.py. Usage: step_worker.py ACCUM_ITER[,ACCUM_ITER...] OUTPUT
"""

import sys

import torch
from helpers import tiny_mae, varied_images

import engine_pretrain
import masking
from util.data.step_loader import MicroBatch
from util.distributed import world
from util.training.averages import Averages
from util.training.step import GradientStep


def main(accum_iters: str, output: str) -> None:
    device = world.init("cpu")
    results = {
        (strategy, int(accum_iter)): one_step(strategy, int(accum_iter), device)
        for strategy in masking.available()
        for accum_iter in accum_iters.split(",")
    }
    if world.is_main():
        torch.save(results, output)
    world.finish()


def one_step(strategy: str, accum_iter: int, device: torch.device) -> dict:
    torch.manual_seed(0)
    bare = tiny_mae(norm_pix_loss=True, masking=masking.create(strategy))
    model = world.wrap(bare, device, accumulates=accum_iter > 1)
    images, noise = varied_images(13)[1:], torch.rand(12, 64)
    share = list(
        zip(images[world.rank() :: world.world_size()], noise[world.rank() :: world.world_size()], strict=True)
    )
    size = -(-len(share) // accum_iter)
    parts = [share[i : i + size] for i in range(0, len(share), size)]
    batches = [
        MicroBatch([torch.stack(t) for t in zip(*part, strict=True)], part is parts[-1], 0, range(0), 12, [])
        for part in parts
    ]

    optimizer = torch.optim.SGD([p for p in bare.parameters() if p.requires_grad], lr=0.0)
    update = Keep(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), nominal_count=1000.0)
    averages = Averages(device)
    outcome = engine_pretrain.train_step(model, batches, update, averages, lambda micro: tuple(micro.batch))
    loss, _, mask = bare(images, noise)
    return {
        "loss": torch.tensor(averages.read()["loss"], dtype=torch.float64),
        "whole_batch_loss": loss.detach().double(),
        "norm": outcome.norm,
        "gradients": {name: p.kept for name, p in bare.named_parameters() if p.requires_grad},
        "kept": mask.sum(1).tolist(),
    }


class Keep(GradientStep):
    """Keeps the final gradients, which a step clears."""

    def apply(self, *arguments):
        step = self.optimizer.step

        def keep_and_step():
            for parameter in self.parameters:
                parameter.kept = parameter.grad.clone()
            return step()

        self.optimizer.step = keep_and_step
        return super().apply(*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
