"""SimMIM from a `simmim_tiny` file: latents, reconstruction, loss and gradients, without and with stochastic depth."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import torch
from torch import nn

import masking
from masking import Mask
from methods import At, Inputs, Plan, SimMIM
from models_simmim import SimMIMViT


def compute(golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Compute what the file holds from its configuration, weights, images and random numbers."""
    given = {name: torch.from_numpy(np.array(value)) for name, value in golden.items() if value.dtype.kind != "U"}
    config = json.loads(str(golden["config"]))
    model = build(config, given)
    images, grid = given["images"], model.patch_embed.grid_size
    mask = choose(config, model, given)
    tokens = model.embed(images)
    results = {"mask": mask.mask.view(-1, *grid).long(), "patch_embed": tokens, "rel_pos_bias": model.rel_pos_bias()}
    seen = []
    hook = model.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    latent = model.encode(tokens, mask)
    hook.remove()
    results |= {"encoder_input": seen[0][0], "block0": seen[0][1]}
    results["latent"] = latent[:, 1:].transpose(1, 2).unflatten(2, grid)
    results["reconstruction"] = model.unpatchify(model.forward_decoder(latent))
    loss, gradients = step(model, images, mask)
    results |= {"loss": loss} | {f"grad/{name}": gradient for name, gradient in gradients.items()}
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]  # an identity has none
    results["drop_path/rates"] = torch.tensor(rates, dtype=torch.float64)
    if "drop_path/keep" in given:
        results |= stochastic_depth(model, images, mask, given["drop_path/keep"], rates)
    return {name: value.detach().numpy() for name, value in results.items()}


def build(config: dict, given: dict[str, torch.Tensor]) -> SimMIMViT:
    """Build the product's model with the weights of the file."""
    names = SimMIMViT.__init__.__annotations__
    options = {name: value for name, value in config.items() if name in names}
    norm_layer = partial(nn.LayerNorm, eps=config["layer_norm_eps"])
    model = SimMIMViT(**options, init_values=config["layer_scale_init"], norm_layer=norm_layer)
    state = {
        name.removeprefix("state/").removeprefix("encoder."): value
        for name, value in given.items()
        if name.startswith("state/") and not name.endswith("relative_position_index")
    }
    model.load_state_dict(state)
    return model.eval()


def choose(config: dict, model: SimMIMViT, given: dict[str, torch.Tensor]) -> Mask:
    """Ask the product's strategy for the cells that come first in the recorded permutation."""
    side = config["mask_cell"] // model.patch_embed.patch_size[0]
    order = given["cell_permutation"].long()
    strategy = masking.create("random", mask_ratio=removed_share(config["mask_ratio"], order.shape[1]), cell=side)
    places = torch.arange(order.shape[1]).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)  # the first of the permutation are removed
    noise = (order.shape[1] - 1 - rank) / order.shape[1]
    return strategy(model.embed(given["images"]), noise=noise, grid=model.patch_embed.grid_size)


def removed_share(mask_ratio: float, num_cells: int) -> str:
    """Return the share of the cells that the authors remove: they round the product of two floats up."""
    return f"{math.ceil(num_cells * mask_ratio)}/{num_cells}"


def step(model: SimMIMViT, images: torch.Tensor, mask: Mask) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return loss and gradients, under the file's names."""
    method = SimMIM(model, None)
    method.zero_grad()
    plan = Plan({"pixels": mask.loss_weight.sum()}, mask)
    (loss,) = method(Inputs([images]), plan, At(0, 0.0, 1)).values()
    mean = loss.sum / loss.count
    mean.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return mean, {n if n.startswith("decoder.") else f"encoder.{n}": g for n, g in gradients.items()}


def stochastic_depth(
    model: SimMIMViT, images: torch.Tensor, mask: Mask, keep: torch.Tensor, rates: list[float]
) -> dict[str, torch.Tensor]:
    """Return loss and gradients for the recorded draws `keep` (block, branch, image)."""
    for number, block in enumerate(model.blocks):
        for branch, name in enumerate(("drop_path1", "drop_path2")):
            setattr(block, name, Recorded(keep[number, branch], rates[number]))
    loss, gradients = step(model, images, mask)
    norms = {f"drop_path/grad_norm/{name}": gradient.norm() for name, gradient in gradients.items()}
    return {"drop_path/loss": loss} | norms


class Recorded(nn.Module):
    """Stochastic depth whose draw is known."""

    def __init__(self, keep: torch.Tensor, rate: float):
        super().__init__()
        self.keep, self.rate = keep, rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (self.keep / (1 - self.rate)).to(x.dtype).view(-1, 1, 1)
