"""What only a GPU can show. Every test here is marked `gpu`."""

from __future__ import annotations

import pytest
import torch
from helpers import MODEL_STRATEGIES, tiny_mae, varied_images
from step_worker import METHODS, given_to, removed, tiny_method
from test_packing import LENGTHS, each_alone

import masking
import models_mae
from methods import CMAE, HPM, IBOT, MAE, At, BootMAE, Inputs, SimMIM
from models_bootmae import bootmae_vit_base_patch16
from models_ibot import ibot_vit_base_patch16
from models_simmim import simmim_vit_base_patch16
from util import optim, precision
from util.data import transforms
from util.packing import PackedLayout, packed_attention, packed_cross_attention
from util.training.averages import Averages
from util.training.step import GradientStep, train_step

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def tf32():
    """As the mains set it."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


def base_model(name: str, **options) -> models_mae.MaskedAutoencoderViT:
    torch.manual_seed(0)
    strategy = masking.create(name)
    return models_mae.mae_vit_base_patch16(norm_pix_loss=True, masking=strategy, **options).to(GPU)


def photographs(count: int) -> torch.Tensor:
    """(N, 3, 224, 224) with edges and flat parts, so that the share of salient tokens varies."""
    return torch.nn.functional.interpolate(varied_images(count), size=224, mode="bilinear")


@pytest.mark.parametrize("name", [*MODEL_STRATEGIES, "block", "color", "inverse_block"])
def test_masks_and_salience_equal_the_cpus(name):
    model, images, noise = base_model(name).cpu(), photographs(6), torch.rand(6, 196)
    tokens = model.embed(images)
    expected = model.choose_mask(images, noise)
    affinity = (tokens.double() @ tokens.double().transpose(1, 2)).softmax(dim=-1).sum(dim=1)
    low, high = affinity.aminmax(dim=1, keepdim=True)
    salience = ((affinity - low) / (high - low)).float()
    model.to(GPU)
    with torch.autocast("cuda", torch.bfloat16):
        tokens = model.embed(images.to(GPU))
        found = model.choose_mask(images.to(GPU), noise.to(GPU))
        # Raw inner products reach 2000, of which fp32 resolves 1e-4: exponents, and salience, are off by as much.
        torch.testing.assert_close(masking.token_salience(tokens).cpu(), salience, rtol=0, atol=2e-3)
    # Where salience ranks, two tokens of nearly one score may change places.
    assert (found.mask.cpu() != expected.mask).sum() <= (4 if masking.reads_tokens(model.masking) else 0)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_packed_attention_is_each_sequence_alone(lengths, dtype):
    torch.manual_seed(0)
    exact = torch.randn(sum(lengths), 3, 4, 64, device=GPU, requires_grad=True)
    weight = torch.randn(sum(lengths), 4, 64, device=GPU)
    expected = each_alone(exact, lengths)
    expected_gradient = torch.autograd.grad((expected * weight).sum(), exact)[0]
    rough = exact.detach().to(dtype).requires_grad_()
    found = packed_attention(rough, PackedLayout.from_lengths(lengths, GPU))
    assert found.dtype == dtype
    assert relative(found, expected) < 1e-2
    assert relative(torch.autograd.grad((found * weight).sum(), rough)[0], expected_gradient) < 1e-2


@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_packed_training_is_close_to_each_image_alone_in_fp32(compiled):
    torch._dynamo.reset()
    model, images, noise = base_model("sbam_amr", depth=4, decoder_depth=2), photographs(8), torch.rand(8, 196)
    images, noise = images.to(GPU), noise.to(GPU)
    total, removed, counts = 0.0, 0, []
    for i in range(8):
        loss, _, mask = model(images[i : i + 1], noise[i : i + 1])
        total, removed = total + loss * mask.sum(), removed + mask.sum()
        counts.append(int(mask.sum()))
    assert len(set(counts)) > 2
    (total / removed).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if compiled:
        model.compile_blocks()
    with torch.autocast("cuda", torch.bfloat16):
        loss, _, mask = model(images, noise)
    loss.backward()
    assert mask.sum(1).tolist() == counts
    assert relative(loss, total / removed) < 1e-2
    everything = [torch.cat([g[n].flatten() for n in expected]) for g in (expected, _gradients(model))]
    assert relative(everything[1], everything[0]) < 3e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_cross_attention_is_each_image_alone(dtype):
    torch.manual_seed(0)
    lengths, number = (50, 1, 3, 197), 65
    exact = [torch.randn(4, number, 2, 64, device=GPU), torch.randn(sum(lengths), 2, 2, 64, device=GPU)]
    query, memory = (tensor.to(dtype).requires_grad_() for tensor in exact)
    found = packed_cross_attention(query, memory, PackedLayout.from_lengths(lengths, GPU))
    for i, alone in enumerate(exact[1].split(lengths)):
        key, value = alone.transpose(0, 2).unbind(1)  # (H, length, d) each
        expected = torch.nn.functional.scaled_dot_product_attention(exact[0][i].transpose(0, 1), key, value)
        assert relative(found[i], expected.transpose(0, 1)) < 1e-2
    found.sum().backward()
    assert query.grad.isfinite().all()
    assert memory.grad.isfinite().all()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_the_losses_and_gradients_that_it_has_on_the_cpu(name, compiled):
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.reset()
    images, noise, found = varied_images(8), torch.rand(8, 64), []
    for device in (torch.device("cpu"), GPU):
        torch.manual_seed(0)
        method = tiny_method(name, "sbam_amr").to(device)
        if compiled and device is GPU:
            method.set_normalize(transforms.Normalize(0.0, 1.0))
            method.compile_parts()
        inputs = given_to(name, images.to(device), noise.to(device))
        plan = method.choose(inputs, At(0, 0.0, 1))
        losses = method.forward(inputs, plan, At(0, 0.0, 1))
        sum(loss.sum / loss.count for loss in losses.values()).backward()
        found.append((plan, losses, {n: p.grad for n, p in method.named_parameters() if p.grad is not None}))
    (plan, losses, gradients), (gpu_plan, gpu_losses, gpu_gradients) = found
    assert torch.equal(removed(gpu_plan).cpu(), removed(plan))
    for term, loss in losses.items():
        assert relative(gpu_losses[term].sum.cpu(), loss.sum) < 1e-4
    assert gpu_gradients.keys() == gradients.keys()
    both = [torch.cat([g[n].cpu().flatten() for n in gradients]) for g in (gpu_gradients, gradients)]
    # The gradient of SimMIM's absolute error jumps where a pixel is met.
    assert relative(*both) < (1e-2 if name == "simmim" else 1e-3)


def _gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "waits", "share", "kind"),
    [
        ("random", 0, 1, MAE),
        ("sbam", 0, 1, MAE),
        ("sbam", 0, 0.5, MAE),
        ("color", 0, 1, MAE),
        ("inverse_block", 0, 1, MAE),
        ("hpm", 0, 1, HPM),
        ("sbam_amr", 1, 1, MAE),
        ("sbam_amr", 1, 0.5, MAE),
        ("block", 1, 1, MAE),
        ("sbam", 0, 1, SimMIM),
        ("sbam", 0, 1, BootMAE),
        ("sbam_amr", 1, 1, BootMAE),
        ("sbam", 0, 1, CMAE),
        ("sbam", 0, 1, IBOT),
        ("attmask_hint", 0, 1, IBOT),
        ("sbam_amr", 1, 1, IBOT),
    ],
)
def test_a_training_step_never_makes_the_host_wait(name, waits, share, kind):
    """Under AMR once a micro-batch: the number of packed tokens is a shape. Blocks are drawn on the host."""
    constructors = {SimMIM: simmim_vit_base_patch16, BootMAE: bootmae_vit_base_patch16, IBOT: ibot_vit_base_patch16}
    model = constructors[kind](depth=2) if kind in constructors else base_model(name, depth=2, decoder_depth=2)
    method, images = kind(model, masking.create(name)).to(GPU), photographs(8).to(GPU)
    method.decode_ratio, method.amp = share, "bf16"
    optimizer = optim.pretrain_adamw(method.parameter_groups(0.05), GPU)
    update = GradientStep(method, optimizer, precision.grad_scaler("bf16", GPU))
    noise = torch.rand(16 if kind is IBOT else 8, 196, device=GPU)
    averages, halves = (
        Averages(GPU),
        [Inputs([images] * 2, noise, ratios=masking.Ratios((0.3,) * 16)) for _ in range(2)],
    )

    def step() -> None:
        train_step(method, halves, At(0, 0.0, 1), update, averages, "bf16")

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") if waits else _no_warning():
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class _no_warning:
    def __enter__(self):
        import warnings

        self.context = warnings.catch_warnings()
        self.context.__enter__()
        warnings.simplefilter("error")

    def __exit__(self, *error):
        self.context.__exit__(*error)


def test_fine_masks_of_a_tiny_model_equal_the_cpus():
    model, images, noise = tiny_mae(masking=masking.create("sbam_amr")), varied_images(6), torch.rand(6, 64)
    expected = model(images, noise)[2]
    assert torch.equal(model.cuda()(images.cuda(), noise.cuda())[2].cpu(), expected)
