"""One optimizer step of every strategy and several methods on 12 images, with or without torchrun.

Run by test_distributed.py. Usage: step_worker.py ACCUM_ITER[,ACCUM_ITER...] OUTPUT
"""

import sys
from dataclasses import replace
from fractions import Fraction

import torch
from helpers import MODEL_STRATEGIES, tiny_mae, varied_images

import masking
from methods import CMAE, HPM, IBOT, MAE, At, BootMAE, Inputs, Loss, Plan, SimMIM
from models_bootmae import BootMAEViT
from models_ibot import IBOTViT
from models_simmim import SimMIMViT
from util.distributed import world
from util.training.averages import Averages
from util.training.step import GradientStep, train_step


def main(accum_iters: str, output: str) -> None:
    device = world.init("cpu")
    results = {
        (name, strategy, int(accum_iter)): one_step(name, strategy, int(accum_iter), device)
        for name in METHODS
        for strategy in MODEL_STRATEGIES
        for accum_iter in accum_iters.split(",")
        if name != "cmae" or accum_iter == "1"  # its negatives are the images of a step
    }
    if world.is_main():
        torch.save(results, output)
    world.finish()


class TwoTerms(MAE):
    """MAE with a second term, counted in images: the class token's mean square over the images it is computed for.

    Its denominator differs from the first one's, so a mean of means would be off wherever counts differ.
    """

    def choose(self, inputs: Inputs, at: At) -> Plan:
        plan = super().choose(inputs, at)
        chosen = plan.mask.num_keep > 20  # another share of images in every micro-batch
        return replace(plan, counts=plan.counts | {"class_token": chosen.sum()}, extra={"chosen": chosen})

    def forward(self, inputs: Inputs, plan: Plan, at: At) -> dict[str, Loss]:
        losses = super().forward(inputs, plan, at)
        token = self.model.encode(self.model.embed(inputs.views[0]), None)[:, 0]  # (N, D)
        squares = token.square().mean(dim=1) * plan.extra["chosen"]
        return losses | {"class_token": Loss(0.3 * squares.sum(), plan.counts["class_token"])}


class PartlyDecoded(MAE):
    """MAE that predicts a third of the removed tokens, in the sequences that this leaves."""

    def choose(self, inputs: Inputs, at: At) -> Plan:
        self.decode_ratio = Fraction(1, 3)
        # The noise of the masks, turned around, in place of the loader's second draw.
        return super().choose(inputs._replace(decode_noise=1 - inputs.noise), at)


METHODS = {"mae": MAE, "two terms": TwoTerms, "partly decoded": PartlyDecoded, "hpm": HPM, "cmae": CMAE}
METHODS |= {"simmim": SimMIM, "bootmae": BootMAE, "ibot": IBOT}


def tiny_model(name: str) -> torch.nn.Module:
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 4}
    if name == "simmim":
        return SimMIMViT(**sizes, drop_path_rate=0.0)
    if name == "ibot":
        return IBOTViT(**sizes)
    return BootMAEViT(**sizes, decode_dim=36) if name == "bootmae" else tiny_mae(norm_pix_loss=True)


def tiny_method(name: str, strategy: str) -> torch.nn.Module:
    """Build a method from the current random state."""
    options = {"ibot": {"drop_path": 0.0, "freeze_last_layer": 0, "local_size": 16}}
    options["ibot"] |= {"out_dim": 32, "hidden_dim": 24, "bottleneck_dim": 12}
    return METHODS[name](tiny_model(name), masking.create(strategy), **options.get(name, {}))


def given_to(name: str, images: torch.Tensor, noise: torch.Tensor) -> Inputs:
    """Return images (N, C, H, W) and noise (N, L) as the method gets them; the second view is of CMAE and iBOT."""
    if name != "ibot":
        return Inputs([images, images.flip(3)], noise)
    rows = (0.6 * noise[:, 0]).tolist()
    views = [images, images.flip(3), images[:, :, :16, 8:24]]
    return Inputs(views, torch.cat([noise, 1 - noise]), ratios=masking.Ratios((*rows, *rows)))


def removed(plan: Plan) -> torch.Tensor:
    """Return the mask of a plan, (N, L) bool."""
    return plan.extra["mask"] if plan.mask is None else plan.mask.mask


def one_step(name: str, strategy: str, accum_iter: int, device: torch.device) -> dict:
    torch.manual_seed(0)
    method = tiny_method(name, strategy)
    forward = world.wrap(method, device, accumulates=accum_iter > 1)
    images, noise = varied_images(13)[1:], torch.rand(12, 64)
    mine = slice(world.rank(), None, world.world_size())
    shares = zip(images[mine].tensor_split(accum_iter), noise[mine].tensor_split(accum_iter), strict=True)
    batches = [given_to(name, part, drawn) for part, drawn in shares]

    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.0)
    update, averages = Keep(forward, optimizer, torch.amp.GradScaler("cpu", enabled=False)), Averages(device)
    outcome = train_step(method, batches, At(0, 0.0, 1), update, averages, "none")
    whole = given_to(name, images, noise)
    plan = method.choose(whole, At(0, 0.0, 1))
    losses = method(whole, plan, At(0, 0.0, 1))
    return {
        "loss": torch.tensor(averages.read()["loss"], dtype=torch.float64),
        "whole_batch_loss": sum(loss.sum / loss.count for loss in losses.values()).detach().double(),
        "norm": outcome.norm,
        "gradients": {name: p.kept for name, p in method.named_parameters() if p.requires_grad},
        "kept": (~removed(plan)).sum(dim=1).tolist(),
    }


class Keep(GradientStep):
    """Keeps the final gradients, which a step clears."""

    def apply(self, *arguments, **named):
        step = self.optimizer.step

        def keep_and_step():
            for parameter in self.parameters:
                parameter.kept = parameter.grad.clone()
            return step()

        self.optimizer.step = keep_and_step
        return super().apply(*arguments, **named)


if __name__ == "__main__":
    main(*sys.argv[1:])
