"""CMAE from a `cmae_tiny` file: intermediates, both losses, gradients, one AdamW step, the teacher."""

from __future__ import annotations

import json
import math
import re
from functools import partial

import numpy as np
import torch
from torch import nn

import masking
import models_mae
from methods import CMAE, At, Inputs, Plan
from methods.teacher import follow
from util import optim

_NAMES = (
    (r"^(target_)?backbone\.", lambda m: "teacher.model." if m[1] else "model."),
    (r"^pixel_decoder\.ln1\.", "model.decoder_norm."),
    (r"^pixel_decoder\.", "model."),
    (r"^feature_decoder\.ln1\.", "feature_decoder.decoder_norm."),
    (r"^target_projector\.", "teacher.projector."),
    (r"^head\.", ""),
    (r"patch_embed\.projection", "patch_embed.proj"),
    (r"ffn\.layers\.0\.0", "mlp.fc1"),
    (r"ffn\.layers\.1", "mlp.fc2"),
    (r"\.layers\.(\d+)\.", r".blocks.\1."),
    (r"(blocks\.\d+)\.ln([12])", r"\1.norm\2"),
    (r"^(model|teacher\.model)\.ln1\.", r"\1.norm."),
)


def ours(name: str) -> str:
    """Return the product's name of a tensor."""
    for pattern, new in _NAMES:
        name = re.sub(pattern, new, name)
    return name


def compute(golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Compute what the file holds from its configuration, weights, both views and noise."""
    given = {name: torch.from_numpy(np.array(value)) for name, value in golden.items() if value.dtype.kind != "U"}
    config = json.loads(str(golden["config"]))
    method = build(config, given)
    names = {ours(n.removeprefix("state/")): n.removeprefix("state/") for n in given if n.startswith("state/")}
    model, images = method.model, given["images"].float()
    inputs = Inputs([images, given["images_target"].float()], given["mask/noise"])
    ratio = f"{config['cells'] - config['keep_cells']}/{config['cells']}"  # the file keeps whole cells, rounded down
    side = math.isqrt(config["num_tokens"] // config["cells"])
    object.__setattr__(method, "strategy", masking.create("random", mask_ratio=ratio, cell=side))
    at = At(0, 0.0, 1)
    seen, hooks = watch(method)
    plan = method.choose(inputs, at)
    results = {"mask/mask": plan.mask.mask.to(torch.uint8), "target/pixel": pixel_target(model, images)}
    losses = method(inputs, plan, at)
    for hook in hooks:
        hook.remove()
    results |= intermediates(method, seen, plan, images)
    pixel, contrast = (losses[name].sum / losses[name].count for name in ("pixels", "contrast"))
    results |= {
        "loss/pixel": model.forward_loss(images, results["pred/pixel"], plan.mask),  # weights may be 0
        "loss/contrastive": contrast,
        "loss/cross_entropy": nn.functional.cross_entropy(results["mid/logits"], results["mid/label"]),
        "loss/total": pixel + contrast,
    }
    (pixel + contrast).backward()
    results |= {f"grad/{names[n]}": p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}
    results |= one_step(config, method, names)
    return {name: value.detach().numpy() for name, value in results.items()}


def build(config: dict, given: dict[str, torch.Tensor]) -> CMAE:
    """Build the product's method with the weights of the file."""
    known = models_mae.MaskedAutoencoderViT.__init__.__annotations__
    options = {name: value for name, value in config.items() if name in known}
    norm_layer = partial(nn.LayerNorm, eps=config["ln_eps"])
    model = models_mae.MaskedAutoencoderViT(**options, norm_pix_loss=True, norm_layer=norm_layer)
    method = CMAE(
        model,
        None,
        pixel_weight=config["rc_weight"],
        contrast_weight=config["ct_weight"],
        temperature=config["temperature"],
        feature_depth=config["feature_decoder_depth"],
        hidden_dim=config["hidden_dim"],
        proj_dim=config["proj_dim"],
    )
    state = {ours(n.removeprefix("state/")): value for n, value in given.items() if n.startswith("state/")}
    found = method.load_state_dict(state, strict=False)
    assert not found.missing_keys, found
    assert found.unexpected_keys == ["feature_decoder.decoder_pos_embed"]  # the same table as the pixel decoder's
    return method.train()


def watch(method: CMAE) -> tuple[dict, list]:
    """Return what passes the modules, under the product's names, and the hooks that fill it."""
    seen: dict[str, list] = {}

    def keep(name: str, module: nn.Module):
        return module.register_forward_hook(lambda m, i, o: seen.setdefault(name, []).append((i[0], o)))

    hooks = [keep(name, module) for name, module in method.named_modules() if name]
    return seen, hooks


def pixel_target(model: models_mae.MaskedAutoencoderViT, images: torch.Tensor) -> torch.Tensor:
    """Return MAE's normalised patches (N, L, P)."""
    patches = model.patchify(images)
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def intermediates(method: CMAE, seen: dict, plan: Plan, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what is computed on the way to the losses, but for the kept tokens, which the file has in any order."""
    found = {}
    found["mid/target/input"] = seen["teacher.model.blocks.0"][0][0]
    found["mid/target/latent"] = seen["teacher.model.norm"][0][1]
    found["mid/pixel_decoder/input"] = seen["model.decoder_blocks.0"][0][0]
    found["mid/feature_decoder/input"] = seen["feature_decoder.decoder_blocks.0"][0][0]
    found["pred/pixel"] = seen["model.decoder_pred"][0][1][:, 1:]
    found["pred/feature"] = seen["feature_decoder.decoder_pred"][0][1][:, 1:]
    pooled, projection = seen["projector"][0]
    found |= {"mid/online/pooled": pooled[:, None], "mid/online/projection": projection[:, None]}
    found["mid/online/projector_bn0"] = seen["projector.bn0"][0][1]
    pooled, target = seen["teacher.projector"][0]
    found |= {"mid/target/pooled": pooled[:, None], "mid/target/projection": target[:, None]}
    prediction = seen["predictor"][0][1]
    found["mid/online/prediction"] = prediction[:, None]
    found["mid/logits"] = nn.functional.normalize(prediction, dim=-1) @ plan.extra["targets"].T / method.temperature
    found["mid/label"] = torch.arange(len(images)) + plan.extra["first"]
    return found


def one_step(config: dict, method: CMAE, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Take one AdamW step with the gradients at hand, and move the teacher."""
    settings = config["adamw"]
    optimizer = optim.pretrain_adamw(method.parameter_groups(settings["weight_decay"]), torch.device("cpu"))
    for group in optimizer.param_groups:
        group |= {name: settings[name] for name in ("lr", "betas", "eps")}
    optimizer.step()
    follow(method.teacher, method, config["momentum"], torch.tensor(True))
    after, teacher = {}, {}
    for name, value in method.state_dict().items():
        if name in names:
            after[f"after/{names[name]}"] = value
            if name.startswith("teacher."):
                teacher[f"ema_after/{names[name]}"] = value
    return after | teacher
