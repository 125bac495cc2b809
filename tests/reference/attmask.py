"""AttMask from an `attmask_masks` file: masks from attention, a step of iBOT with each, the voting k-NN."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from reference import ibot

import masking
from evaluation.features import voting_accuracies
from methods import At

GOLDENS = Path(__file__).parent.parent / "goldens"


def compute(golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Compute the masks of every case, one step of training for each strategy, and the k-NN accuracies."""
    results = {}
    for case in json.loads(str(golden["cases"])):
        name, side = f"case{case['index']:02d}", case["grid"]
        attention = torch.from_numpy(golden[f"attention/{side}x{side}"])[:, None]
        noise = hint_noise(golden, name, attention.shape[-1])
        replaced = replace(f"attmask_{case['mode']}", case, attention, golden[f"{name}/uniform"], noise)
        results[f"{name}/mask"] = replaced.mask.numpy()
    config = json.loads(str(golden["config"]))
    if (GOLDENS / config["tiny"]).is_file():
        results |= training(golden, config)
    return results | neighbours(golden)


def tensor(array: np.ndarray) -> torch.Tensor:
    """Return a fresh tensor of an array."""
    return torch.from_numpy(np.array(array))


def hint_noise(golden: dict[str, np.ndarray], name: str, num_tokens: int) -> torch.Tensor | None:
    """Return noise (N, L) that is lowest where the file reveals tokens; None where it reveals none."""
    noise, revealed = golden.get(f"{name}/hint_noise"), golden.get(f"{name}/revealed")
    if noise is None and revealed is not None:
        noise = np.ones((len(revealed), num_tokens), dtype=np.float32)
        np.put_along_axis(noise, revealed, 0.0, axis=1)
    return None if noise is None else tensor(noise)


def replace(name: str, case: dict, attention: torch.Tensor, uniform: np.ndarray, noise: torch.Tensor | None):
    """Mask by attention (N, heads, L) as a case says; noise (N, L) draws what is revealed."""
    options = {"show_max": case["show_max"]} if name == "attmask_hint" else {}
    strategy = masking.create(name, **options)
    rows = tuple(case["ratio"] if u <= case["masking_prob"] else 0.0 for u in uniform.tolist())
    tokens = torch.zeros(len(attention), attention.shape[-1], 1)
    return masking.replace(strategy, tokens, masking.Ratios(rows, case["second_ratio"]), noise, attention=attention)


def training(golden: dict[str, np.ndarray], config: dict) -> dict[str, np.ndarray]:
    """Take the first step of the iBOT file that `config["tiny"]` names, with the masks of each strategy."""
    with np.load(GOLDENS / config["tiny"]) as file:
        tiny = dict(file)
    given = {name: tensor(value) for name, value in tiny.items() if value.dtype.kind != "U"}
    settings, results = json.loads(str(tiny["config"])), {}
    for name in sorted({key.split("/")[1] for key in golden if key.startswith("train/")}):
        found = one_step(golden, config, settings, given, name)
        results |= {f"train/{name}/{key}": value for key, value in found.items()}
    method = ibot.build(settings, given)
    images = torch.cat(ibot.inputs_of(given).views[:2])
    with torch.no_grad():
        before = method.model._encode(method.model.embed_view(images), None)[1]
        last = method.model.blocks[-1]
        results["attention/teacher_last_block_cls_rows"] = last.attn.weights_of_first(last.norm1(before)).numpy()
    return results


def one_step(golden: dict, config: dict, settings: dict, given: dict, name: str) -> dict[str, np.ndarray]:
    """Return attention, masks, losses and two gradients of one step."""
    method, inputs = ibot.build(settings, given), ibot.inputs_of(given)
    images = torch.cat(inputs.views[:2])
    case = config | dict(zip(("ratio", "second_ratio"), golden[f"train/{name}/ratios"].tolist(), strict=True))
    noise = hint_noise(golden, f"train/{name}", method.model.num_patches)
    with torch.no_grad():
        latent, attention = method.teacher_latent(images, attends=True)
        replaced = replace(name, case, attention, golden[f"train/{name}/uniform"], noise)
        plan = method.plan(latent, replaced)
    step = settings["first_iteration"]
    losses = method(inputs, plan, At(step, step / settings["niter"], settings["epochs"]))
    terms = {key: loss.sum / loss.count for key, loss in losses.items()}
    total = terms["cls"] + terms["patch"]
    total.backward()
    grid = (2, len(images) // 2, *method.model.patch_embed.grid_size)
    found = {"cls_attention": attention.mean(dim=1), "masks": replaced.mask.view(grid), "loss/loss": total}
    found |= {f"loss/{key}": value for key, value in terms.items()}
    for key, parameter in (("masked_embed", method.masked_embed), ("cls_token", method.student.cls_token)):
        limit = config["student_clip"] or torch.inf
        found[f"grad_{key}"] = parameter.grad * (limit / (parameter.grad.norm() + 1e-6)).clamp(max=1)
    return {key: value.detach().numpy() for key, value in found.items()}


def neighbours(golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the accuracies of every setting that `golden["knn/results"]` names, with our numbers."""
    if "knn/results" not in golden:
        return {}
    train, val = (
        tuple(tensor(golden[f"knn/{part}_{what}"]) for what in ("features", "labels")) for part in ("train", "test")
    )
    settings = json.loads(str(golden["knn/results"]))
    for setting in settings:
        for top in (1, 5):
            given = {"neighbours": [setting["k"]], "temperature": setting["temperature"], "top": top}
            setting[f"top{top}"] = round(voting_accuracies(train, val, **given)[0], 6)
    return {"knn/results": np.array(json.dumps(settings))}
