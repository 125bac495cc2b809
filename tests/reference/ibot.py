"""iBOT from an `ibot_tiny` file: three steps, with outputs, losses, gradients, centres, teacher and schedules."""

from __future__ import annotations

import json
from unittest import mock

import numpy as np
import torch
from timm.layers import DropPath

from masking import Replaced
from methods import IBOT, At, Inputs, Plan
from models_ibot import IBOTViT
from util import optim
from util.training.step import GradientStep

_FILES = {"student": ("student.", "head."), "teacher": ("model.", "teacher_head.")}


def ours(name: str, network: str = "student") -> str:
    """Return the product's name of a tensor of one of the two networks."""
    backbone, head = _FILES[network]
    if name == "backbone.masked_embed":
        return "masked_embed"
    return name.replace("backbone.", backbone, 1) if name.startswith("backbone.") else name.replace("head.", head, 1)


def compute(golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Compute what the file holds from its configuration, weights, crops, masks and first centres."""
    given = {name: torch.from_numpy(np.array(value)) for name, value in golden.items() if value.dtype.kind != "U"}
    config = json.loads(str(golden["config"]))
    method = build(config, given)
    names = {ours(name): name for name in _names(given, "student")}
    results = schedules(config, method) | outputs(method, given, config) | dropped(given)
    betas = tuple(config["betas"])
    optimizer = optim.pretrain_adamw(method.parameter_groups(config["wd"]), torch.device("cpu"), betas)
    for group in optimizer.param_groups:
        group["eps"] = config["eps"]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    update = GradientStep(method, optimizer, scaler, config["clip"] or None, method.clip_each)
    for step in range(sum(name.startswith("masks/step") for name in given)):
        found = one_step(method, update, config, given, step, names)
        results |= found if step == 0 else {k: v for k, v in found.items() if f"step{step}" in k}
    return {
        name: value.detach().numpy() if isinstance(value, torch.Tensor) else value for name, value in results.items()
    }


def build(config: dict, given: dict[str, torch.Tensor]) -> IBOT:
    """Build the product's method with the weights and centres of the file."""
    model = IBOTViT(
        img_size=config["img"],
        patch_size=config["patch"],
        embed_dim=config["dim"],
        depth=config["depth"],
        num_heads=config["heads"],
    )
    taken = ("warmup_teacher_temp", "teacher_temp", "warmup_teacher_patch_temp", "teacher_patch_temp")
    taken += ("warmup_teacher_temp_epochs", "lambda1", "lambda2", "norm_last_layer", "momentum", "out_dim")
    method = IBOT(
        model,
        None,
        patch_out_dim=None if config["shared_head"] else config["patch_out_dim"],
        hidden_dim=config["hidden"],
        bottleneck_dim=config["bott"],
        freeze_last_layer=config["freeze"],
        drop_path=config["drop_path"],
        student_temp=config["student_temp"],
        center_momentum=config["center_momentum"],
        weight_decay_end=config["wd_end"],
        local_size=config["patch"],  # any that fits: the views are given
        local_crops_number=config["nlocal"],
        pred_start_epoch=config.get("pred_start_epoch", 0),
        **{name: config[name] for name in taken},
    )
    if not config["shared_head"] and config["shared_head_teacher"]:
        method.teacher_head.last_layer2 = None  # the teacher follows the student's class layer
    state = {ours(name, net): given[f"state/{net}/{name}"] for net in _FILES for name in _names(given, net)}
    for name in ("cls", "patch"):
        state[f"center_{name}"] = given[f"center_{name}/step0_before"]
    method.load_state_dict(state)
    method.peak_lr = config["lr"] * config["batch_size_per_gpu"] * config["world_size"] / 256
    method.min_lr, method.warmup_epochs = config["min_lr"], config["warmup_epochs"]
    return method.train()


def _names(given: dict, network: str) -> list[str]:
    prefix = f"state/{network}/"
    return [name.removeprefix(prefix) for name in given if name.startswith(prefix)]


def planned(method: IBOT, inputs: Inputs, mask: torch.Tensor) -> Plan:
    """Return the plan of a step whose masks (2, N, rows, columns) are given."""
    with torch.no_grad():
        latent, _ = method.teacher_latent(torch.cat(inputs.views[:2]))
        return method.plan(latent, Replaced(mask.flatten(0, 1).flatten(1)))


def inputs_of(given: dict) -> Inputs:
    """Return the crops of the file, the two global ones first."""
    return Inputs([given[f"crops/{number}"] for number in range(sum(name.startswith("crops/") for name in given))])


def outputs(method: IBOT, given: dict, config: dict) -> dict[str, torch.Tensor]:
    """Compute logits of all tokens, and what goes into the student's first block."""
    inputs, mask = inputs_of(given), given["masks/step0"].flatten(0, 1).flatten(1)
    images, found = torch.cat(inputs.views[:2]), {}
    seen, hook = _first_inputs(method.student)
    with torch.no_grad():
        latent = {"student": method.student_latent(images, mask), "teacher": method.teacher_latent(images)[0]}
        method.student.encode(method.student.embed_view(inputs.views[0]))
        for net, head in (("student", method.head), ("teacher", method.teacher_head)):
            unit = head.project(latent[net])
            found[f"out/{net}_cls"], found[f"out/{net}_patch"] = (
                head.of_images(unit[:, 0]),
                head.of_patches(unit[:, 1:]),
            )
        if inputs.views[2:]:
            local = torch.cat(inputs.views[2:])
            unit = method.head.project(method.student.encode(method.student.embed_view(local))[:, 0])
            found["out/student_local_cls"] = method.head.of_images(unit)
            found["pos_embed/local"] = method.student.positions(local)
    hook.remove()
    count = len(inputs.views[0])
    found["out/tokens_global0_replaced"], found["out/tokens_global0"] = seen[0][:count], seen[1]
    return found


def _first_inputs(model: IBOTViT) -> tuple[list, object]:
    seen: list[torch.Tensor] = []
    return seen, model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))


def dropped(given: dict) -> dict[str, torch.Tensor]:
    """Drop branches with the recorded numbers, as the student's blocks do."""
    if "drop_path/uniform" not in given:
        return {}

    def recorded(self: torch.Tensor, keep: float) -> torch.Tensor:
        return self.copy_((given["drop_path/uniform"] + keep).floor())

    with mock.patch.object(torch.Tensor, "bernoulli_", recorded):
        return {"drop_path/out": DropPath(float(given["drop_path/p"])).train()(given["drop_path/x"])}


def one_step(
    method: IBOT, update: GradientStep, config: dict, given: dict, step: int, names: dict[str, str]
) -> dict[str, torch.Tensor]:
    """Take one step; return losses, gradients, centres, and the weights after it."""
    inputs, iteration = inputs_of(given), config["first_iteration"] + step
    steps_per_epoch = config["niter"]
    at = At(iteration, iteration / steps_per_epoch, config["epochs"])
    lr, decay = method.schedule(at, method.peak_lr, config["wd"])
    for group in update.optimizer.param_groups:
        group["lr"], group["weight_decay"] = lr, decay if group["weight_decay"] else 0.0
    update.begin()
    losses = method(inputs, planned(method, inputs, given[f"masks/step{step}"]), at)
    terms = {name: loss.sum / loss.count for name, loss in losses.items()}
    total = terms["cls"] + terms["patch"]
    update.backward(total)
    found = {f"loss/step{step}/{name}": value.detach() for name, value in (terms | {"loss": total}).items()}
    raw = _gradients(method, names)
    found[f"grad_norms/step{step}"] = torch.stack([grad.double().norm() for grad in raw.values()])
    method.on_gradients(at)
    found[f"has_grad/step{step}"] = np.array(json.dumps(list(_gradients(method, names))))
    if step == 0:
        found["grad_norm_names"] = np.array(json.dumps(list(raw)))
    for name, grad in raw.items() if step == 0 else ():
        found[f"grad/{name}"] = grad
        factor = (config["clip"] / (grad.norm() + 1e-6)).clamp(max=1) if config["clip"] else torch.ones(())
        if factor < 1:
            found[f"grad_clipped/{name}"] = grad * factor
    update.apply(total, len(inputs.views[0]))
    method.after_step(at, torch.tensor(True))
    found[f"center_cls/step{step}_after"] = method.center_cls.clone()
    found[f"center_patch/step{step}_after"] = method.center_patch.clone()
    state = {net: _state(method, net, given) for net in _FILES}
    digest = [sum(v.double().abs().sum() for v in state[net].values()) for net in _FILES]
    found[f"digest/step{step}"] = torch.stack(digest)
    if step == 0:
        found |= {f"{net}_after_step0/{name}": v.clone() for net in _FILES for name, v in state[net].items()}
    return found


def _gradients(method: IBOT, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Return the gradients that there are, under the file's names and in its order."""
    whole = dict(method.named_parameters())
    return {name: whole[own].grad.clone() for own, name in names.items() if whole[own].grad is not None}


def _state(method: IBOT, network: str, given: dict) -> dict[str, torch.Tensor]:
    whole = dict(method.named_parameters())
    return {name: whole[ours(name, network)].detach() for name in _names(given, network)}


def schedules(config: dict, method: IBOT) -> dict[str, np.ndarray]:
    """Compute every schedule of the run."""
    per_epoch, epochs = config["niter"], config["epochs"]
    ats = [At(step, step / per_epoch, epochs) for step in range(per_epoch * epochs)]
    pairs = [method.schedule(at, method.peak_lr, config["wd"]) for at in ats]
    names = ("teacher_temp", "teacher_patch_temp")
    return {
        "schedule/lr": np.array([lr for lr, _ in pairs]),
        "schedule/weight_decay": np.array([decay for _, decay in pairs]),
        "schedule/momentum": np.array([method.momentum_at(at) for at in ats]),
        **{f"schedule/{name}": np.array([method.temperature_at(name, e) for e in range(epochs)]) for name in names},
    }
