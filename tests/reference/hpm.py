"""HPM from an `hpm_tiny` file: masks over the training, both decoders, both losses, gradients, the teacher."""

from __future__ import annotations

import json
from fractions import Fraction
from functools import partial

import numpy as np
import torch
from torch import nn

import masking
import models_mae
from masking.mask import Mask
from methods import HPM, At, Inputs
from methods.hpm import absolute_loss, relative_loss
from methods.teacher import follow


def compute(golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Compute what the file holds from its configuration, both networks' weights, images and random numbers."""
    given = {name: torch.from_numpy(np.array(value)) for name, value in golden.items() if value.dtype.kind != "U"}
    config = json.loads(str(golden["config"]))
    method = build(config, given)
    images = given["images"]
    teacher_loss = method.predict(images)
    results = {"ema_loss_pred": teacher_loss}
    masks = {}
    drawn = {int(name.split("/")[1].removeprefix("epoch_")) for name in given if name.startswith("random/epoch_")}
    epochs = given["epochs"].tolist() if "epochs" in given else sorted(drawn)
    for epoch in epochs:
        at = At(0, float(epoch), config["total_epochs"])
        noise = ranked_noise(
            {key.split("/")[-1]: v for key, v in given.items() if f"epoch_{epoch}/" in key}, teacher_loss
        )
        masks[epoch] = method.choose(Inputs([images], noise), at)
        results[f"mask/epoch_{epoch}"] = masks[epoch].mask.mask
    removed = int(masks[epoch].mask.mask[0].sum())
    counts = [method.strategy.hard_count(removed, e, config["total_epochs"]) for e in epochs]
    results["hard_counts"] = torch.tensor(counts)
    trained = int(config["train_mask"].split("_")[-1])
    results |= one_step(method, images, masks[trained], given)
    if "ema_updated/decay" in given:
        results |= updated_teacher(given)
    return {name: value.detach().numpy() for name, value in results.items()}


def build(config: dict, given: dict[str, torch.Tensor]) -> HPM:
    """Build the product's method with the student's and the teacher's weights."""
    names = models_mae.MaskedAutoencoderViT.__init__.__annotations__
    norm_layer = partial(nn.LayerNorm, eps=config["layer_norm_eps"])
    options = {name: value for name, value in config.items() if name in names}
    model = models_mae.MaskedAutoencoderViT(**options, norm_layer=norm_layer)
    kept = int(model.num_patches * (1 - config["mask_ratio"]))  # the release rounds down
    method = HPM(model, masking.create("hpm", mask_ratio=1 - Fraction(kept, model.num_patches)))
    state = renamed(given, "state/") | {f"teacher.{n}": value for n, value in renamed(given, "ema/").items()}
    unused = method.load_state_dict(state, strict=False)
    assert not unused.missing_keys
    assert all(name.startswith("teacher.model.decoder_") for name in unused.unexpected_keys)
    return method.eval()


def renamed(given: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors below `prefix` under the product's names."""
    return {ours(name.removeprefix(prefix)): value for name, value in given.items() if name.startswith(prefix)}


def ours(name: str) -> str:
    """Return the product's name of a parameter."""
    if "_losspred" in name:
        return f"predictor.{name.removeprefix('decoder_').replace('_losspred', '')}"
    return f"model.{name}"


def theirs(name: str) -> str:
    """Return the file's name of a parameter."""
    if not name.startswith("predictor."):
        return name.removeprefix("model.")
    part, dot, rest = name.removeprefix("predictor.").partition(".")
    return f"decoder_{part}_losspred{dot}{rest}"


def ranked_noise(random: dict[str, torch.Tensor], teacher_loss: torch.Tensor) -> torch.Tensor:
    """Turn the recorded random numbers into noise (N, L) in [0, 1) that ranks the patches alike."""
    num_images, num_tokens = teacher_loss.shape
    if "noise" in random:
        return random["noise"].argsort(dim=1).argsort(dim=1) / num_tokens
    order = random["rest_order"]  # of the patches that are not hard, the first are kept
    place = torch.arange(order.shape[1]).expand_as(order) / num_tokens
    return torch.zeros(num_images, num_tokens).scatter(1, order, place)


def one_step(method: HPM, images: torch.Tensor, plan, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Compute latents, predictions, losses and gradients with one mask."""
    model, mask = method.model, plan.mask
    latent = model.forward_encoder(images, mask)
    x = model.decoder_input(latent, mask)
    first, among = visible_first(mask), mask.mask
    predicted = method.predictor(model, x, mask)
    pred = model.run_decoder(model.decoder_blocks, model.decoder_norm, model.decoder_pred, x, mask)
    kept_order = mask.ids_keep.argsort(dim=1)
    results = {
        "latent": torch.cat([latent[:, :1], take(latent[:, 1:], kept_order)], dim=1),
        "decoder_input": torch.cat([x[:, :1], take(x[:, 1:], first)], dim=1),
        "pix_pred": take(pred, first),
        "loss_pred": take(predicted, first),
    }
    masked = first[:, mask.num_keep[0] :]
    if "ties/patch_loss" in given:
        true = given["ties/patch_loss"]
        total, pairs = relative_loss(true, take(predicted, masked), torch.ones_like(true, dtype=torch.bool))
        results["ties/relative_loss"] = total / pairs
    for prefix, norm_pix_loss in (("raw_pix", False), ("norm_pix", True)):
        model.norm_pix_loss = norm_pix_loss
        method.zero_grad()
        losses = method(Inputs([images]), plan, At(0, 0.0, 1))
        per_patch = model.patch_losses(images, pred, mask).detach()
        _, pairs = relative_loss(per_patch, predicted, among)
        pixel, relative = (
            losses["pixels"].sum / losses["pixels"].count,
            losses["hardness"].sum / losses["hardness"].count,
        )
        (pixel + relative).backward()
        total, number = absolute_loss(per_patch, predicted.detach(), among)
        of_masked = take(per_patch, masked)
        results |= {
            f"{prefix}/patch_loss": of_masked,
            f"{prefix}/pixel_loss": pixel,
            f"{prefix}/relative_loss": relative,
            f"{prefix}/total_loss": pixel + relative,
            f"{prefix}/absolute_loss": total / number,
            f"{prefix}/valid_pairs": pairs.long(),
        }
        gradients = {theirs(n): p.grad for n, p in method.named_parameters() if p.grad is not None}
        if norm_pix_loss:
            results |= {f"{prefix}/grad/{n}": gradient.clone() for n, gradient in gradients.items()}
        else:
            results |= {f"{prefix}/grad_norm/{n}": gradient.norm() for n, gradient in gradients.items()}
    return results


def visible_first(mask: Mask) -> torch.Tensor:
    """Return the order in which the file has the patches: the visible ones, then the masked, in raster order each."""
    return mask.mask.long().argsort(dim=1, stable=True)


def take(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return values (N, L, ...) in the order (N, M) of each image."""
    return values[torch.arange(len(values))[:, None], order]


def updated_teacher(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Move the teacher's weights once, with the recorded momentum."""
    student, teacher = Weights(given, "state/"), Weights(given, "ema/")
    follow(teacher, student, float(given["ema_updated/decay"]), torch.tensor(True))
    return {f"ema_updated/{name.replace('|', '.')}": value for name, value in teacher.named_parameters()}


class Weights(nn.Module):
    """The tensors below a prefix, as parameters."""

    def __init__(self, given: dict[str, torch.Tensor], prefix: str):
        super().__init__()
        for name, value in given.items():
            if name.startswith(prefix):
                parameter = nn.Parameter(value.clone(), requires_grad=False)
                self.register_parameter(name.removeprefix(prefix).replace(".", "|"), parameter)
