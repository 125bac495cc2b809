"""BootMAE from a `bootmae_tiny` file: intermediates, targets, losses, gradients, one AdamW step, the teacher."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import torch
from torch import nn

import masking
from masking import Mask
from methods import At, BootMAE, Inputs, Plan
from methods.teacher import follow
from models_bootmae import BootMAEViT
from util import optim


def compute(golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Compute what the file holds from its configuration, both networks' weights, images and random numbers."""
    given = {name: torch.from_numpy(np.array(value)) for name, value in golden.items() if value.dtype.kind != "U"}
    config = json.loads(str(golden["config"]))
    method = build(config, given)
    model, images = method.model, given["images"]
    order = draw_order(config, given)
    mask = from_order(order, config["num_tokens"] - config["mask_num"])
    results = {"mask/ids_shuffle": order.short(), "mask/mask": mask.mask.to(torch.uint8)}
    at = At(0, float(config["epoch"]), config["epochs"])
    plan = planned(method, images, mask)
    results |= intermediates(model, images, mask)
    results["target/pixel"] = model.unpatchify(model.pixel_target(images))
    results["target/feature"] = plan.extra["features"]
    results["loss/weight"] = method.patch_weights(mask.mask)
    losses = method(Inputs([images]), plan, at)
    pixel, feature = (losses[name].sum / losses[name].count for name in ("pixels", "features"))
    results |= {"loss/pixel": pixel, "loss/feature": unweighted(method, images, plan), "loss/total": pixel + feature}
    (pixel + feature).backward()
    results |= {f"grad/{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    results |= one_step(config, method)
    return {name: value.detach().numpy() for name, value in results.items()}


def build(config: dict, given: dict[str, torch.Tensor]) -> BootMAE:
    """Build the product's method with the student's and the teacher's weights."""
    names = BootMAEViT.__init__.__annotations__
    options = {name: value for name, value in config.items() if name in names}
    norm_layer = partial(nn.LayerNorm, eps=config["ln_eps"])
    model = BootMAEViT(**options, norm_pix_loss=True, norm_layer=norm_layer)
    model.load_state_dict(part(given, "state/"))
    method = BootMAE(model, None, weight=config["feature_weight"], weigh_surrounded=config["weight_mask"])
    teacher = part(given, "ema/")
    found = {name: teacher[name] for name in method.teacher.state_dict() if name in teacher}
    assert set(method.teacher.load_state_dict(found, strict=False).missing_keys) <= {"pos_embed"}
    return method.eval()


def part(given: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors below `prefix`."""
    return {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}


def draw_order(config: dict, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Turn block masks and noise into the order of the tokens, as the authors' loader and training step do together."""
    key = (1 - given["mask/block"].flatten(1).float()) + given["mask/noise"].flatten(1)
    return key.argsort(dim=1, descending=True, stable=True).roll(config["roll"], dims=1)


def from_order(order: torch.Tensor, num_keep: int) -> Mask:
    """Keep the first tokens of each image's order."""
    return masking.mask_from_scores(order.argsort(dim=1).float(), num_keep)


def planned(method: BootMAE, images: torch.Tensor, mask: Mask) -> Plan:
    """Let the method plan with this mask in place of a strategy's."""
    method.model.set_masking(lambda tokens, noise=None: mask)
    object.__setattr__(method, "strategy", method.model.masking)
    return method.choose(Inputs([images]), At(0, 0.0, 1))


def unweighted(method: BootMAE, images: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Return the features' loss without its weight, which may be 0."""
    weight, method.weight = method.weight, 1.0
    with torch.no_grad():
        loss = method(Inputs([images]), plan, At(0, 1.0, 1))["features"]  # late enough for the whole weight
    method.weight = weight
    return loss.sum / loss.count


def intermediates(model: BootMAEViT, images: torch.Tensor, mask: Mask) -> dict[str, torch.Tensor]:
    """Return predictions and what is computed on the way to them."""
    found = {}

    def keep(module: nn.Module, name: str, inputs: bool = False):
        return module.register_forward_hook(lambda m, i, o: found.__setitem__(name, i[0] if inputs else o))

    hooks = [keep(model.blocks[0].norm1, "mid/encoder/input", inputs=True)]
    hooks += [keep(block, f"mid/encoder/block{i}") for i, block in enumerate(model.blocks)]
    for name, blocks, norm in (
        ("regressor", model.decode_blocks, model.decode_norm),
        ("predictor", model.decode_blocks_1, model.decode_norm_1),
    ):
        hooks += [keep(blocks[0].norm1, f"mid/{name}/input", inputs=True)]
        hooks += [keep(blocks[0].attn, f"mid/{name}/block0_self_attn")]
        hooks += [keep(blocks[0].c_attn, f"mid/{name}/block0_cross_attn")]
        hooks += [keep(block, f"mid/{name}/block{i}") for i, block in enumerate(blocks)]
        hooks += [keep(norm, f"mid/{name}/norm")]
    tokens = model.embed(images)
    first, last = model.encode_features(tokens, mask)
    latent = model.norm(last)
    found["pred/pixel"] = model.unpatchify(model.regress(latent, first, mask))
    found["pred/feature"] = model.predict_features(latent, last, mask)
    for hook in hooks:
        hook.remove()
    return found | {"mid/encoder/norm": latent, "mid/patch_tokens": tokens - model.pos_embed[:, 1:]}


def one_step(config: dict, method: BootMAE) -> dict[str, torch.Tensor]:
    """Take one AdamW step with the gradients at hand, and move the teacher."""
    settings, model = config["adamw"], method.model
    optimizer = optim.pretrain_adamw(method.parameter_groups(settings["weight_decay"]), torch.device("cpu"))
    for group in optimizer.param_groups:
        group |= {name: settings[name] for name in ("lr", "betas", "eps")}
    optimizer.step()
    follow(method.teacher, model, config["ema_decay"], torch.tensor(True))
    after = {f"after/{name}": p for name, p in model.named_parameters() if p.requires_grad}
    return after | {f"ema_after/{n}": p for n, p in method.teacher.named_parameters() if p.grad is None}
