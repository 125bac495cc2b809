"""What a sweep costs: the count on tensors without content is that of a real step, and what has none is said."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, write_pictures
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import methods
from benchmarks.measure import training_flops
from methods import At
from studies import cost, sweep
from util import cli
from util.config import FinetuneSettings, LinprobeSettings, PretrainSettings

METHODS = {
    "mae": ["--model", "mae_vit_mini_patch4"],
    "hpm": ["--model", "mae_vit_mini_patch4", "--masking", "hpm"],
    "simmim": ["--model", "simmim_vit_mini_patch4", "--mask_ratio", "0.5"],
    "bootmae": ["--model", "bootmae_vit_mini_patch4"],
    "cmae": ["--model", "mae_vit_mini_patch4", "--method_args", "feature_depth=1", "shift=4"],
    "ibot": ["--model", "ibot_vit_mini_patch4", "--method_args", "local_size=8", "pred_ratio=0.25", "out_dim=64"],
}


def pretraining(*flags) -> PretrainSettings:
    return cli.parse(PretrainSettings, [*map(str, flags)])


def counted(method, inputs) -> tuple[int, int]:
    """FLOPs of choosing and of the forward pass, on real tensors."""
    at = At(0, 0.0, 10)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        plan = method.choose(inputs, at)
        chosen = counter.get_total_flops()
        method(inputs, plan, at)
    return chosen, counter.get_total_flops() - chosen


@pytest.mark.parametrize("name", METHODS)
def test_the_count_is_that_of_a_real_step(name):
    settings = pretraining("--method", name, *METHODS[name])
    method = methods.from_settings(settings).train()
    mask = cost.FixedCounts.of(method, At(0, 0.0, 10))
    assert mask.keep == (8 if name == "simmim" else 4)
    method.model.set_masking(mask)
    object.__setattr__(method, "strategy", mask)
    chosen, forward = counted(method, cost.blank_inputs(method, settings))
    assert forward > 0
    assert (chosen > 0) == (name not in ("mae", "simmim"))  # where a teacher is asked
    assert cost.method_flops(settings, mask) == (chosen + 3 * forward) / 2
    settings.grad_checkpointing = True
    assert cost.method_flops(settings, mask) == (chosen + 4 * forward) / 2


def test_the_count_is_about_that_of_the_benchmarks():
    """Which embed all patches, and do so thrice."""
    settings = pretraining("--config", ROOT / "configs/pretrain/vitl16_mae.yaml")
    with torch.device("meta"):
        model = methods.base.build_model(settings)
    one = cost.method_flops(settings, cost.FixedCounts(49))
    assert one == pytest.approx(training_flops(model, [49]), rel=0.01)
    assert one == pytest.approx(124.5e9, rel=0.01)  # docs/PRETRAIN.md


@pytest.mark.parametrize(("config", "task", "gflop"), [("vitb16", "finetune", 105.4), ("vitl16", "linprobe", 123.1)])
def test_classifiers_cost_what_the_documents_say(config, task, gflop):
    settings_class, passes = {"finetune": (FinetuneSettings, 3), "linprobe": (LinprobeSettings, 1)}[task]
    settings = cli.parse(settings_class, ["--config", str(ROOT / f"configs/{task}/{config}.yaml")])
    assert passes * cost.classifier_flops(settings) == pytest.approx(gflop * 1e9, rel=0.005)


def test_random_epochs_thrown_patches_and_attention_maps():
    flags = ["--model", "mae_vit_mini_patch4", "--epochs", 10, "--masking", "amt", "--masking_warmup_epochs", 3]
    settings = pretraining(*flags, "--mask_ratio", 0.75, "--masking_args", "refresh_epochs=2", "warmup_ratio=0.5")
    random, thrown = (cost.method_flops(settings, cost.FixedCounts(*counts)) for counts in ((8,), (4, 7)))
    assert thrown < cost.method_flops(settings, cost.FixedCounts(4)) < random
    encoder = cost.encoder_flops(settings)
    expected = 3 * random + 7 * thrown + 4 * encoder  # maps after epochs 2, 4, 6, 8
    assert cost.pretrain_flops(settings, 100) == pytest.approx(100 * expected)
    settings.stop_after_epoch = 4
    assert cost.pretrain_flops(settings, 100) == pytest.approx(100 * (3 * random + 2 * thrown + 2 * encoder))


def test_adaptive_ratios_count_as_the_base_ratio_and_cells_as_their_patches():
    def keep(*flags):
        with torch.device("meta"):
            method = methods.from_settings(pretraining("--model", "mae_vit_tiny_patch4", *flags))
        return cost.FixedCounts.of(method, At(0, 0.0, 10)).keep

    assert keep("--masking", "sbam_amr") == keep("--masking", "random") == 16
    assert keep("--masking", "sbam", "--masking_args", "cell=2", "--mask_ratio", 0.5) == 32


UNCOUNTABLE = """
from methods import MAE


class Uncountable(MAE):
    def choose(self, inputs, at):
        inputs.views[0].sum().item()
        return super().choose(inputs, at)
"""


def write(tmp_path, **changes):
    pretrain = {"config": str(ROOT / "configs/pretrain/digits.yaml"), "epochs": 2, "warmup_epochs": 0}
    content = {"output": str(tmp_path / "o"), "pretrain": pretrain, "grid": {"method": ["mae"]}}
    content |= {"measure": {"evaluate": {"metrics": ["knn"], "train_images": 100}}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content | changes))
    return sweep.expand(sweep.load(tmp_path / "sweep.yaml"))


def test_what_cannot_be_counted_is_said_and_left_out(tmp_path, monkeypatch):
    (tmp_path / "own_cost.py").write_text(UNCOUNTABLE)
    monkeypatch.syspath_prepend(tmp_path)
    (run,) = write(tmp_path)
    settings = run.steps[0].settings
    lines = cost.describe([run])
    mask = cost.FixedCounts(4, reads_tokens=True)
    flops = 2 * 1438 * cost.method_flops(settings, mask) + (100 + 359) * cost.encoder_flops(settings)
    hours = flops / (0.3 * 154.8e12) / 3600
    told = (
        f"2 commands: {hours:.2g} GPU hours, {hours / 8:.2g} h on 8 x A6000, if each reaches 30% (assumed) of its 154.8"
    )
    assert lines[0].startswith(told)
    assert lines[-1] == "counted, not measured, on 1,438 + 359 images of digits; sbam_amr at its base ratio"

    lines = cost.describe(write(tmp_path, grid={"method": ["mae", "own_cost:Uncountable"]}))
    assert lines[0].startswith("3 commands: ")  # its encoder is MAE's
    assert lines[-1].startswith("NOT counted: 1 x pretrain (DataDependentOutputException: ")


def test_the_images_that_are_there_are_counted(tmp_path):
    settings = pretraining("--data_path", tmp_path / "none")
    assert cost.images_of(settings) == (
        cost.IMAGENET,
        f"on ImageNet-1K's 1,281,167 + 50,000 images, because {tmp_path}/none is not here",
    )
    settings.data_path = str(write_pictures(tmp_path / "pictures", classes=2, per_class=6))
    assert cost.images_of(settings)[0] == (12, 12)
    np.save(tmp_path / "12.npy", np.zeros((8, 8, 12), dtype=np.uint8))
    bands = pretraining("--data_path", tmp_path, "--in_chans", 12, "--loader", "util.loaders:npy")
    assert cost.images_of(bands)[0] == (1, 0)
