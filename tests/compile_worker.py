"""Two steps of MAE on 12 images, eager and compiled, under torchrun.

Run by test_distributed.py. Usage: compile_worker.py OUTPUT
"""

import sys

import torch
from helpers import tiny_mae, varied_images
from torch._dynamo.backends.debugging import aot_eager

import masking
from methods import MAE, At, Inputs
from util.distributed import world
from util.training.averages import Averages
from util.training.step import GradientStep, train_step


def main(output: str) -> None:
    device, graphs = world.init("cpu"), []

    def backend(graph, inputs):
        graphs.append(" ".join(node.name for node in graph.graph.nodes))
        return aot_eager(graph, inputs)

    eager = two_steps(method(), device)
    compiled = method()
    compiled.compile_parts()
    compiled.model.compile_blocks(backend=backend)  # Inductor would take a minute
    results = {"eager": eager, "compiled": two_steps(compiled, device), "graphs": graphs}
    if world.is_main():
        torch.save(results, output)
    world.finish()


def method() -> MAE:
    """Return MAE whose blocks have 1.8 MB, more than DDP's first bucket."""
    torch.manual_seed(0)
    found = MAE(tiny_mae(embed_dim=192, depth=2, decoder_depth=1), masking.create("sbam_amr"))
    found.set_normalize(torch.nn.Identity())
    return found


def two_steps(method: MAE, device: torch.device) -> list[float]:
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    forward = world.wrap(method, device, accumulates=False)
    update, averages = GradientStep(forward, optimizer, torch.amp.GradScaler("cpu", enabled=False)), Averages(device)
    mine, losses = slice(world.rank(), None, world.world_size()), []
    for step in range(2):
        inputs = Inputs([varied_images(12)[mine]], torch.rand(12, 64)[mine])
        outcome = train_step(method, [inputs], At(step, 0.0, 1), update, averages, "none")
        losses += [outcome.loss.item(), outcome.norm.item()]
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
