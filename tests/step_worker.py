"""One optimizer step of every strategy on a fixed global batch of 12 images, with or without torchrun.

Run by test_distributed.py. Usage: step_worker.py ACCUM_ITER[,ACCUM_ITER...] OUTPUT
"""

import sys

import torch
from helpers import tiny_mae, varied_images

import engine_pretrain
import masking
from util import dist
from util.log import Averages
from util.step import GradientStep


def main(accum_iters: str, output: str) -> None:
    device = dist.init("cpu")
    results = {
        (strategy, int(accum_iter)): one_step(strategy, int(accum_iter), device)
        for strategy in masking.available()
        for accum_iter in accum_iters.split(",")
    }
    if dist.is_main():
        torch.save(results, output)
    dist.finish()


def one_step(strategy: str, accum_iter: int, device: torch.device) -> dict:
    torch.manual_seed(0)
    bare = tiny_mae(norm_pix_loss=True, masking=masking.create(strategy))
    model = dist.wrap(bare, device, accumulates=accum_iter > 1)
    images, noise = varied_images(13)[1:], torch.rand(12, 64)
    share = list(zip(images[dist.rank() :: dist.world_size()], noise[dist.rank() :: dist.world_size()], strict=True))
    size = -(-len(share) // accum_iter)
    parts = [share[i : i + size] for i in range(0, len(share), size)]
    batches = ((i == len(parts) - 1, [torch.stack(t) for t in zip(*p, strict=True)]) for i, p in enumerate(parts))

    optimizer = torch.optim.SGD([p for p in bare.parameters() if p.requires_grad], lr=0.0)
    update = Keep(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), nominal_count=1000.0)
    averages = Averages(device)
    _, norm = engine_pretrain.train_step(model, batches, update, averages, tuple)
    loss, _, mask = bare(images, noise)
    return {
        "loss": torch.tensor(averages.read()["loss"], dtype=torch.float64),
        "whole_batch_loss": loss.detach().double(),
        "norm": norm,
        "gradients": {name: p.kept for name, p in bare.named_parameters() if p.requires_grad},
        "kept": mask.sum(1).tolist(),
    }


class Keep(GradientStep):
    """Keeps the final gradients, which a step clears."""

    def apply(self, count):
        step = self.optimizer.step

        def keep_and_step():
            for parameter in self.parameters:
                parameter.kept = parameter.grad.clone()
            return step()

        self.optimizer.step = keep_and_step
        return super().apply(count)


if __name__ == "__main__":
    main(*sys.argv[1:])
