"""iBOT: its losses, steps and runs, and everything around them that a user of the method meets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import timm
import torch
import transformers
from faults import injected
from helpers import golden_json, log_lines, refusal, varied_images, write_pictures
from runs import assert_same_run, content, flags

import main_finetune
import main_pretrain
import masking
import methods
from evaluation import checkpoints, features
from methods import IBOT, At, Inputs
from methods.heads import Prototypes
from methods.ibot import between_views, compare, cross_entropy
from models_ibot import IBOTViT
from scripts import export, visualize
from util import optim, seeding
from util.data.multi_crop import MultiCrop
from util.data.step_loader import MicroBatch
from util.training.averages import Averages
from util.training.step import GradientStep, train_step

SMALL = ["out_dim=32", "hidden_dim=24", "bottleneck_dim=12", "local_size=16", "local_crops_number=2"]
GIVEN = ["--method", "ibot", "--model", "ibot_vit_mini_patch4", "--input_size", 32, "--clip_grad", 3]
GIVEN += ["--method_args", *SMALL]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), classes=1, per_class=14)


def given(pictures, output, *more) -> list[str]:
    """The flags of `runs.flags` without `--norm_pix_loss`."""
    return [flag for flag in flags(pictures, output, *GIVEN, *more) if flag != "--norm_pix_loss"]


def tiny(strategy: str = "random", **options) -> IBOT:
    torch.manual_seed(0)
    model = IBOTViT(img_size=32, patch_size=4, embed_dim=48, depth=2, num_heads=4)
    sizes = {"out_dim": 32, "hidden_dim": 24, "bottleneck_dim": 12, "local_size": 16, "local_crops_number": 2}
    method = IBOT(model, masking.create(strategy), **(sizes | {"drop_path": 0.0} | options))
    torch.nn.init.normal_(method.masked_embed)
    return method.train()


def inputs(number: int, ratio: float = 0.4) -> Inputs:
    torch.manual_seed(1)
    images = varied_images(number + 1)[1:]
    views = [images, images.flip(3), images[:, :, 8:24, 8:24], images[:, :, :16, :16]]
    rows = tuple(ratio * (i % 3) / 2 for i in range(2 * number))
    return Inputs(views, torch.rand(2 * number, 64), ratios=masking.Ratios(rows, 0.3))


def part(whole: Inputs, rows: slice) -> Inputs:
    """Some images of a batch, as a process or a micro-batch has them."""
    halves = whole.noise.chunk(2)
    count = len(halves[0])
    ratios = itertools.chain(*(whole.ratios.rows[i * count : (i + 1) * count][rows] for i in range(2)))
    noise = torch.cat([half[rows] for half in halves])
    return Inputs([view[rows] for view in whole.views], noise, ratios=whole.ratios._replace(rows=tuple(ratios)))


def stepping(method: IBOT, scaler: torch.amp.GradScaler | None = None) -> GradientStep:
    """Steps of AdamW, clipped."""
    optimizer = optim.pretrain_adamw(method.parameter_groups(0.04), torch.device("cpu"), method.betas)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    return GradientStep(method, optimizer, scaler, 3.0, method.clip_each)


def test_schedules_are_the_published_ones():
    for known in golden_json("ibot_schedules"):
        names = ("warmup_teacher_temp", "teacher_temp", "warmup_teacher_patch_temp", "teacher_patch_temp")
        options = {name: known[name] for name in (*names, "warmup_teacher_temp_epochs", "momentum", "pred_start_epoch")}
        method = tiny(**options, weight_decay_end=known["weight_decay_end"])
        method.peak_lr, method.min_lr = known["blr"] * known["batch"] / 256, known["min_lr"]
        method.warmup_epochs = known["warmup_epochs"]
        for step, lr, decay, momentum in zip(known["steps"], known["lr"], known["wd"], known["ema"], strict=True):
            at = At(step, step / known["steps_per_epoch"], known["epochs"])
            found = (*method.schedule(at, 0.0, known["weight_decay"]), method.momentum_at(at))
            assert found == pytest.approx((lr, decay, momentum), rel=1e-9, abs=1e-14), (known["name"], step)
        for name in ("teacher_temp", "teacher_patch_temp"):
            found = [method.temperature_at(name, epoch) for epoch in known["epochs_sampled"]]
            assert found == pytest.approx(known[f"{name}s"], rel=1e-12)


def test_the_losses_are_the_sums_over_pairs_and_tokens():
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 3, 5), torch.randn(2, 3, 5).softmax(dim=-1)
    pairs = [cross_entropy(logits[v], targets[q]) for q in range(2) for v in range(4) if v != q]
    torch.testing.assert_close(between_views(logits, targets), torch.stack(pairs).mean(dim=0).sum())
    known = torch.nn.functional.cross_entropy(logits[0], targets[0], reduction="none")
    torch.testing.assert_close(cross_entropy(logits[0], targets[0]), known)


@pytest.mark.parametrize("strategy", ["random", "sbam_amr", "block", "attmask_hint"])
def test_masked_patches_alone_give_the_loss_of_all(strategy):
    """The savings are exact: the patches' head on masked tokens, the centre from the mean of unit vectors."""
    method, whole, at = tiny(strategy), inputs(6), At(5, 1.0, 10)
    plan = method.choose(whole, at)
    found = method(whole, plan, at)["patch"]
    images, mask = torch.cat(whole.views[:2]), plan.extra["mask"]
    assert 0 < mask.sum() < mask.numel()
    assert not mask[::3].any()  # their ratio is 0
    with torch.no_grad():
        latent, _ = method.teacher_latent(images)
        teacher = method.teacher_head.of_patches(method.teacher_head.project(latent[:, 1:]))
    temperature = method.temperature_at("teacher_patch_temp", 1)
    target = ((teacher - method.center_patch) / temperature).softmax(dim=-1)
    student = method.head.of_patches(method.head.project(method.student_latent(images, mask)[:, 1:])) / 0.1
    each = -(target * student.log_softmax(dim=-1)).sum(dim=-1)  # (2 N, L)
    per_image = (each * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    torch.testing.assert_close(found.sum / found.count, per_image.view(2, 6).mean(), rtol=1e-5, atol=1e-6)
    method.after_step(at, torch.tensor(True))
    torch.testing.assert_close(method.center_patch[0, 0], 0.1 * teacher.mean(dim=(0, 1)), rtol=1e-4, atol=1e-6)


def test_micro_batches_and_a_skipped_step():
    """Uneven micro-batches have the gradient and the centres of the whole; a step that is skipped changes nothing."""
    whole, at, found = inputs(8), At(6, 1.0, 10), []
    for parts in ([slice(None)], [slice(0, 3), slice(3, 8)]):
        method = tiny("sbam_amr")
        update = stepping(method)
        batches = [part(whole, rows) for rows in parts]
        train_step(method, batches, at, update, Averages(torch.device("cpu")), "none")
        found.append({name: value.clone() for name, value in method.state_dict().items()})
    for name, value in found[0].items():
        tolerance = 1e-5 if "center" in name else 2e-3  # of AdamW's steps: see the test against the goldens
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=tolerance, msg=name)
    assert (found[0]["center_cls"] != 0).any()

    before = {name: value.clone() for name, value in method.state_dict().items()}
    broken = part(whole, slice(0, 4))
    broken.views[2][:] = float("nan")
    outcome = train_step(method, [broken], at, update, Averages(torch.device("cpu")), "none")
    assert outcome.skipped
    torch.testing.assert_close(method.state_dict(), before, rtol=0, atol=0)


def test_fp16_steps_whose_gradient_overflows_leave_teacher_and_centres_alone():
    """The loss is finite in each step; its scale makes the gradient overflow until it has been lowered enough."""
    method, whole, at, skipped = tiny("sbam_amr"), inputs(6), At(6, 1.0, 10), []
    for parameter in (*method.student.parameters(), *method.head.parameters()):
        parameter.data += 0.01 * torch.randn_like(parameter)  # apart from the teacher's, which would follow
    update = stepping(method, torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-20))
    while not skipped or skipped[-1]:
        before = {name: value.clone() for name, value in method.state_dict().items()}
        outcome = train_step(method, [whole], at, update, Averages(torch.device("cpu")), "fp16")
        assert outcome.loss.isfinite()
        skipped.append(bool(outcome.skipped))
        if skipped[-1]:
            torch.testing.assert_close(method.state_dict(), before, rtol=0, atol=0)
        assert len(skipped) < 8
    assert skipped.count(True) > 1
    for name in ("model.pos_embed", "teacher_head.last_layer.weight_v", "center_cls", "center_patch"):
        assert not torch.equal(method.state_dict()[name], before[name]), name


def test_prototypes_are_frozen_in_the_first_epoch():
    whole = inputs(4)
    for epoch, moves in ((0.5, False), (1.0, True)):
        method = tiny()
        update = stepping(method)
        before = method.head.last_layer.weight_v.clone()
        train_step(method, [whole], At(3, epoch, 10), update, Averages(torch.device("cpu")), "none")
        assert (not torch.equal(before, method.head.last_layer.weight_v)) == moves


def micro_batch(places: range) -> MicroBatch:
    """Images of a step of 400, without the images."""
    return MicroBatch([], 3, places, 400, list(places))


def test_ratios_belong_to_the_place_in_the_step():
    """Half of the views are whole, the others have U[0.1, 0.5]; two processes draw what one draws."""
    method = tiny()
    whole = method.draw_ratios(micro_batch(range(400)), seed=1).rows
    masked = [ratio for ratio in whole if ratio]
    assert 0.4 < len(masked) / 800 < 0.6
    assert min(masked) > 0.1
    assert max(masked) < 0.5
    odd = method.draw_ratios(micro_batch(range(1, 400, 2)), seed=1).rows
    assert odd == whole[1:400:2] + whole[401::2]
    step = tiny("attmask_high")
    drawn = step.draw_ratios(micro_batch(range(400)), seed=1)
    assert len(set(drawn.rows)) == 2
    assert 0.1 < max(drawn.rows) < 0.5
    assert 0.1 < drawn.second < 0.5
    assert drawn.second != max(drawn.rows)


def test_views_follow_from_the_random_state():
    pixels = torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8)
    crop = MultiCrop((32, 48), (0.25, 1.0), 0.5, (16, 16), (0.05, 0.25), 3)
    with seeding.sample_state(0, 0, 0):
        first = crop(pixels)
    with seeding.sample_state(0, 0, 0):
        again = crop(pixels)
    with seeding.sample_state(0, 0, 1):
        other = crop(pixels)
    assert [view.shape for view in first] == [(2, 3, 32, 48), (3, 3, 16, 16)]
    assert all(view.dtype == torch.uint8 for view in first)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    assert len(MultiCrop((32, 32), (0.25, 1.0), 0.5, (16, 16), (0.05, 0.25), 0)(pixels)) == 1


@pytest.mark.parametrize("strategy", ["block", "attmask_hint", "sbam_amr"])
def test_a_run_continues_bit_for_bit(pictures, tmp_path, strategy):
    more = ["--masking", strategy]
    main_pretrain.main(given(pictures, tmp_path / "whole", *more))
    assert {"train_loss_cls", "train_loss_patch", "train_mask_ratio"} <= log_lines(tmp_path / "whole")[-1].keys()
    with injected([{"kind": "SIGTERM", "forward": 5}]), pytest.raises(SystemExit):
        main_pretrain.main(given(pictures, tmp_path / "parts", *more))
    main_pretrain.main(given(pictures, tmp_path / "parts", *more))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (content(tmp_path / name)["method"] for name in ("whole", "parts"))
    assert {"student.pos_embed", "teacher_head.last_layer.weight_v", "center_patch", "masked_embed"} <= whole.keys()
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    main_pretrain.main(given(pictures, folder, "--masking", "attmask_high", "--epochs", 1, "--vis_every", 1))
    return folder / "checkpoint-last.pth"


def test_what_it_leaves_is_the_teacher_as_a_plain_vit(trained, tmp_path, capsys):
    """Exports compute in timm and Hugging Face what `encode` does; there is no decoder to draw."""
    opened = checkpoints.open_checkpoint(trained)
    assert not opened.has_decoder
    images = torch.randn(2, 3, 32, 32)
    expected = features.encode_images(opened.model, images, "cls")
    export.main([str(trained), "--to", "timm", "--output", str(tmp_path / "vit.safetensors")])
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
    path = {"checkpoint_path": str(tmp_path / "vit.safetensors")}
    theirs = timm.create_model("vit_small_patch16_224", num_classes=0, global_pool="token", **sizes, **path).eval()
    torch.testing.assert_close(theirs(images), expected, rtol=1e-5, atol=1e-5)
    export.main([str(trained), "--to", "hf", "--output", str(tmp_path / "hf")])
    model = transformers.ViTModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images).last_hidden_state[:, 0], expected, rtol=1e-5, atol=1e-5)
    visualize.main([str(trained), "--dataset", "digits", "--rows", "1", "--output", str(tmp_path / "masks.png")])
    assert "no decoder" in capsys.readouterr().out


def test_it_is_fine_tuned_at_another_size(trained, pictures, tmp_path):
    arguments = ["--dataset", "digits", "--model", "vit_mini_patch4", "--epochs", 1, "--warmup_epochs", 0]
    arguments += ["--batch_size", 128, "--num_workers", 0, "--output_dir", tmp_path, "--finetune", trained]
    main_finetune.main([str(argument) for argument in arguments])
    assert log_lines(tmp_path)[-1]["test_acc1"] > 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method_args", "local_size=36"], "local_size is 36"),
        (["--method_args", "local_size=18"], "not a whole number of patches"),
        (["--input_size", "30"], "the height of 30 pixels is not a whole number of patches of 4"),
        (["--patch_size", "16", "--method_args", "local_size=24"], "local_size is 24, which is not a whole number of"),
        (["--patch_size", "5"], "the height of 32 pixels is not a whole number of patches of 5"),
        (["--method_args", "teacher_temp=0"], "teacher_temp is 0"),
        (["--method_args", "teacher_patch_temp=0"], "teacher_patch_temp is 0; it must be a number above 0"),
        (["--method_args", "student_temp=0"], "student_temp is 0"),
        (["--method_args", "warmup_teacher_patch_temp=0"], "warmup_teacher_patch_temp is 0"),
        (["--method_args", "pred_ratio=[0,0.9]", "pred_ratio_var=0.2"], "from 0 to 1"),
        (["--method_args", "pred_ratio=[0,0.3]", "pred_ratio_var=[0.1]"], "as many of each"),
        (["--method_args", "masking_prob=0.7"], "masking_prob is 0.7, which ratio_per view passes over"),
        (["--method_args", "local_crops_scale=0.3"], "local_crops_scale"),
        (["--method_args", "momentum=1.5"], "momentum is 1.5"),
        (["--method_args", "out_dim=0"], "out_dim is 0"),
        (["--method_args", "ratio_per=image"], "choose view or step"),
        (["--masking", "amt"], "needs boxes, maps"),
        (["--mask_ratio", "0.6"], "--mask_ratio 0.6: --method ibot draws the ratio of each view"),
        (["--masking", "sbam", "--masking_args", "mask_ratio=0.9"], "--masking_args mask_ratio=0.9: --method ibot"),
        (["--masking", "sbam", "--masking_args", "rounding=removed"], "rounded down; leave it out"),
        (["--masking", "sbam", "--masking_args", "cell=2"], "--masking_args cell=2: --method ibot"),
        (["--masking", "schedule"], "--masking schedule: sets the ratio"),
        (["--masking", "inverse_block"], "--masking inverse_block: sets the ratio"),
        (["--masking", "block", "--masking_args", "roll=1"], "--masking_args roll=1: --method ibot draws blocks by"),
        (["--in_chans", "1"], "changes colours"),
        (["--exact_resize"], "--exact_resize: --method ibot cuts views of its own"),
        (["--weight_decay", "0"], "--weight_decay 0: --method ibot raises it to 0.4"),
        (["--model", "mae_vit_mini_patch4"], "is no IBOTViT"),
    ],
)
def test_mistakes_are_one_sentence(pictures, tmp_path, capsys, arguments, said):
    assert said in refusal(main_pretrain.main, given(pictures, tmp_path, *arguments), capsys)


def test_autocast_does_not_round_the_logits():
    """bf16 has steps of 1/256 below 1, which a temperature of 0.04 makes a tenth."""
    torch.manual_seed(0)
    prototypes, x = Prototypes(48, 32), torch.nn.functional.normalize(torch.randn(5, 48), dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        found = prototypes(x)
    torch.testing.assert_close(found, prototypes(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["ibot", "cmae"])
def test_images_of_other_kinds_than_8_bits_have_no_colours_to_change(tmp_path, capsys, method):
    for number in range(4):
        np.save(tmp_path / f"{number}.npy", np.full((40, 40, 3), 500 * number, dtype=np.uint16))
    model = "ibot_vit_mini_patch4" if method == "ibot" else "mae_vit_mini_patch4"
    arguments = ["--data_path", tmp_path, "--loader", "util.loaders:npy", "--method", method, "--model", model]
    arguments += ["--method_args", "local_size=8"] if method == "ibot" else []
    said = refusal(main_pretrain.main, [*arguments, "--batch_size", 2, "--output_dir", tmp_path / "run"], capsys)
    assert f"--method {method}: changes the colours of 8-bit images, and those of {tmp_path} are uint16" in said


@pytest.mark.parametrize("strategy", ["attmask_high", "attmask_hint", "attmask_low"])
@pytest.mark.parametrize("method", sorted(set(methods.available()) - {"ibot"}))
def test_masks_by_attention_need_a_method_that_gives_it(pictures, tmp_path, capsys, method, strategy):
    model = f"{method}_vit_mini_patch4" if method in ("simmim", "bootmae") else "mae_vit_mini_patch4"
    arguments = ["--data_path", pictures, "--output_dir", tmp_path, "--model", model, "--method", method]
    said = refusal(main_pretrain.main, [*arguments, "--masking", strategy], capsys)
    assert f"--masking {strategy}: needs attention, which --method {method} does not give" in said


@pytest.mark.parametrize("heads", [5, 96])
def test_heads_must_share_the_width(heads):
    with pytest.raises(ValueError, match=f"embed_dim 48 is not divisible by num_heads {heads}"):
        IBOTViT(img_size=32, patch_size=4, embed_dim=48, depth=1, num_heads=heads)


def test_other_numbers_of_patches_and_temperatures_need_no_other_graph():
    """Compiled as `compile_parts` does, but for the backend, which takes half a minute."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(compare, dynamic=True, fullgraph=True, backend="aot_eager")
    for masked, temperature in ((9, 0.04), (7, 0.04), (8, 0.05), (5, 0.07)):
        student = torch.randn(4, 3, 6, requires_grad=True), torch.randn(masked, 5, requires_grad=True)
        teacher, centers = (torch.randn(2, 3, 6), torch.randn(masked, 5)), (torch.randn(1, 6), torch.randn(1, 5))
        given = student, teacher, centers, (0.1, temperature, temperature), torch.rand(masked)
        found, expected = (torch.stack(function(*given)) for function in (compiled, compare))
        torch.testing.assert_close(found, expected)
        gradients = (torch.autograd.grad(losses.sum(), student) for losses in (found, expected))
        torch.testing.assert_close(*gradients)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_twelve_blocks_two_sizes_and_odd_batches_stay_within_the_graphs_that_torch_allows():
    """Each block has a rate of its own; with more than eight graphs torch would refuse."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, at = IBOTViT(img_size=32, patch_size=4, embed_dim=48, depth=12, num_heads=4), At(3, 2.0, 10)
    method = IBOT(model, masking.create("random"), out_dim=32, hidden_dim=24, bottleneck_dim=12, local_size=16).train()
    for encoder in (method.model, method.student):
        encoder.compile_blocks(backend="aot_eager")
    for number in (6, 6, 4, 3):
        whole = inputs(number)
        losses = method(whole, method.choose(whole, at), at)
        sum(loss.sum for loss in losses.values()).backward()
    with torch.no_grad():
        method.model.encode(method.model.embed(varied_images(5)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 5
