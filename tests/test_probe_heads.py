"""Linear probing by iBOT's protocol: several heads at once, on several tokens."""

from __future__ import annotations

import itertools
import math
import shutil

import pytest
import torch
from faults import injected
from helpers import log_lines, run_main, write_pictures
from runs import assert_same_run

import main_linprobe
import models_vit
from evaluation import checkpoints
from exporting import formats
from methods import base
from util import optim
from util.config import PretrainSettings
from util.training import checkpoint
from util.training.step import GradientStep

RATES = [0.01, 0.3, 20.0]
MAE = ["--warmup_epochs", 1]
IBOT = ["--optimizer", "sgd", "--no_batch_norm", "--crop", "torchvision", "--lr_per", "epoch", "--warmup_epochs", 0]
IBOT += ["--last_blocks", 3, "--append_mean"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), classes=3)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    settings = PretrainSettings(model="ibot_vit_mini_patch4")
    torch.manual_seed(1)
    state = {k: value + 0.1 * torch.randn_like(value) for k, value in base.build_model(settings).state_dict().items()}
    path = tmp_path_factory.mktemp("encoder") / "encoder.pth"
    checkpoint.save(path, {"model": state, "args": settings.as_dict(), "grid": [4, 4]})
    return path


def probe(pictures, encoder, output, *more) -> list[dict]:
    given = ["--data_path", pictures, "--model", "vit_mini_patch4", "--finetune", encoder, "--epochs", 3]
    given += ["--batch_size", 4, "--accum_iter", 2, "--num_workers", 0, "--print_freq", 1, "--output_dir", output]
    main_linprobe.main([str(value) for value in [*given, *more]])
    return log_lines(output)


def head_of(output, name: str) -> dict[str, torch.Tensor]:
    state = checkpoint.load(output / checkpoint.LAST)["model"]
    return {leaf: state[f"{name}.{leaf}"] for leaf in ("weight", "bias")}


@pytest.mark.parametrize(("protocol", "rates"), [(MAE, [20.0, 500.0, 2e4]), (IBOT, RATES)], ids=["mae", "ibot"])
def test_every_head_is_what_a_run_of_its_own_trains(pictures, encoder, tmp_path, protocol, rates):
    lines = probe(pictures, encoder, tmp_path / "bank", *protocol, "--blrs", *rates)
    for number, rate in enumerate(rates):
        alone = probe(pictures, encoder, tmp_path / f"{rate}", *protocol, "--blr", rate)
        found, expected = head_of(tmp_path / "bank", f"head.1.{number}"), head_of(tmp_path / f"{rate}", "head.1")
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        for line, own in zip(lines, alone, strict=True):
            for ours, theirs in (("test_acc1", "test_acc1"), ("test_acc5", "test_acc5"), ("test_loss", "test_loss")):
                assert line[f"{ours}_blr_{rate:g}"] == pytest.approx(own[theirs], rel=1e-6), rate
            assert line[f"train_loss_blr_{rate:g}"] == pytest.approx(own["train_loss"], rel=1e-6)
    weights = [head_of(tmp_path / "bank", f"head.1.{number}")["weight"] for number in range(3)]
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.pairwise(weights))
    for line in lines:
        best = max(rates, key=lambda rate, line=line: line[f"test_acc1_blr_{rate:g}"])
        assert (line["test_best_blr"], line["test_acc1"]) == (best, line[f"test_acc1_blr_{best:g}"])
        assert line["test_loss"] == line[f"test_loss_blr_{best:g}"]
    assert lines[-1]["test_acc1_best_epoch"] == max(line["test_acc1"] for line in lines)


@pytest.mark.parametrize(("protocol", "rate"), [(MAE, 1e9), (IBOT, 1e36)], ids=["mae", "ibot"])
def test_a_head_that_diverges_leaves_the_others_alone(pictures, encoder, tmp_path, capsys, protocol, rate):
    lines = probe(pictures, encoder, tmp_path / "bank", *protocol, "--blrs", 0.3, rate, "--epochs", 6)
    assert f"epoch 5: diverged, and learn no more: blr_{rate:g}; lower --blrs" in capsys.readouterr().out
    alone = probe(pictures, encoder, tmp_path / "alone", *protocol, "--blr", 0.3, "--epochs", 6)
    for line, own in zip(lines, alone, strict=True):
        assert line["test_loss_blr_0.3"] == pytest.approx(own["test_loss"], rel=1e-6)
        assert line["train_skipped_steps"] == 0
    assert all(tensor.isfinite().all() for tensor in head_of(tmp_path / "bank", "head.1.1").values())


def test_the_best_head_is_named_and_said_to_be_chosen(pictures, encoder, tmp_path, capsys):
    (line,) = probe(pictures, encoder, tmp_path, *IBOT, "--blrs", *RATES, "--epochs", 1)
    said = f"18 validation images of the best head, --blr {line['test_best_blr']:g}, chosen on these images: "
    assert said + f"{line['test_acc1']:.2f}%" in capsys.readouterr().out
    probe(pictures, encoder, tmp_path, *IBOT, "--blrs", *RATES, "--eval", "--resume", tmp_path / checkpoint.LAST)
    assert said + f"{line['test_acc1']:.2f}%" in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_a_bank_continues_bit_for_bit(pictures, encoder, tmp_path, optimizer):
    given = [*IBOT, "--optimizer", optimizer, "--blrs", *RATES]
    probe(pictures, encoder, tmp_path / "whole", *given)
    with injected([{"kind": "SIGTERM", "forward": 7}]), pytest.raises(SystemExit):
        probe(pictures, encoder, tmp_path / "parts", *given)
    assert len(log_lines(tmp_path / "parts")) == 1
    probe(pictures, encoder, tmp_path / "parts", *given)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_two_processes_train_the_same_heads(pictures, encoder, tmp_path):
    pictures = shutil.copytree(pictures, tmp_path / "pictures")
    (pictures / "val" / "class2" / "0.jpg").unlink()  # the two evaluate 9 and 8 of 17
    probe(pictures, encoder, tmp_path / "one", *IBOT, "--blrs", *RATES)
    given = ["--data_path", pictures, "--model", "vit_mini_patch4", "--finetune", encoder, "--epochs", 3, *IBOT]
    given += ["--batch_size", 4, "--num_workers", 0, "--output_dir", tmp_path / "two", "--blrs", *RATES]
    result = run_main("main_linprobe.py", *given, processes=2)
    assert result.returncode == 0, result.stderr
    one, two = (checkpoint.load(tmp_path / name / checkpoint.LAST)["model"] for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(log_lines(tmp_path / "one"), log_lines(tmp_path / "two"), strict=True):
        assert theirs["test_images"] == 17
        same = [name for name in ours if name.startswith(("test_", "train_loss"))]
        assert [ours[name] for name in same] == pytest.approx([theirs[name] for name in same], rel=1e-4)


def test_the_rate_of_a_whole_epoch(pictures, encoder, tmp_path):
    lines = probe(pictures, encoder, tmp_path, *IBOT, "--blrs", 0.1, 0.4, "--epochs", 4)
    peak = 0.4 * 8 / 256
    expected = [peak * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert [line["train_lr"] for line in lines] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["vit", "simmim_vit", "bootmae_vit"])
def test_what_is_classified(name):
    """The class tokens of the last blocks, from the first of them on, then the mean of the last one's patch tokens."""
    torch.manual_seed(0)
    model = models_vit.create_model(f"{name}_mini_patch4", num_classes=10, global_pool=False)
    outputs, got = [], []
    models_vit.add_probe_head(model, 3, batch_norm=False, last_blocks=2, append_mean=True)
    for block in model.eval().blocks:
        block.register_forward_hook(lambda *arguments: outputs.append(arguments[-1]))
    model.head.register_forward_pre_hook(lambda _, arguments: got.append(arguments[0]))
    with torch.no_grad():
        model.norm.weight += torch.randn(96)
        assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)
        before, last = (model.norm(tokens) for tokens in outputs[1:])
    assert len(outputs) == 3
    torch.testing.assert_close(got[0], torch.cat([before[:, 0], last[:, 0], last[:, 1:].mean(dim=1)], dim=1))


def test_a_skipped_first_step_leaves_sgd_as_it_was():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 2)
    optimizer = optim.probe_sgd([{"params": list(model.parameters())}], 0.0, torch.device("cpu"))
    optimizer.param_groups[0]["lr"] = 0.1
    update = GradientStep(model, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    plain = torch.nn.Linear(5, 2)
    plain.load_state_dict(model.state_dict())
    reference = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for factor in (math.nan, 1.0, 2.0):
        batch = torch.randn(3, 5)
        update.begin()
        loss = factor * model(batch).square().mean()
        update.backward(loss)
        assert update.apply(loss, 3).skipped == math.isnan(factor)
        if not math.isnan(factor):
            reference.zero_grad()
            (factor * plain(batch).square().mean()).backward()
            reference.step()
        torch.testing.assert_close(model.state_dict(), plain.state_dict())


def test_the_heads_are_computed_in_fp32():
    heads = models_vit.LinearHeads([torch.nn.Linear(4, 2) for _ in range(3)])
    with torch.autocast("cpu", torch.float16):
        logits = heads(torch.full((1, 4), 60000.0, dtype=torch.float16) * torch.tensor(1.0))
    assert (logits.shape, logits.dtype) == ((3, 1, 2), torch.float32)
    assert logits.isfinite().all()


@pytest.mark.parametrize("more", [["--blrs", "0.1", "0.2"], ["--last_blocks", "2"], ["--no_batch_norm"]])
def test_a_probe_is_measured_and_exported(pictures, encoder, tmp_path, more):
    """Where no other library has such a head, the encoder is exported without it, and the export says so."""
    probe(pictures, encoder, tmp_path, *more, "--epochs", 1)
    images = torch.randn(2, 3, 16, 16)
    opened, start = checkpoints.open_checkpoint(tmp_path / checkpoint.LAST), checkpoints.open_checkpoint(encoder)
    with torch.no_grad():
        expected = start.model.encode(start.model.embed(images))
        torch.testing.assert_close(opened.model.encode(opened.model.embed(images), None), expected)
    found = formats.read(tmp_path / checkpoint.LAST)
    formats.write(found, "timm", tmp_path / "timm.safetensors")
    assert (
        (found.kind == "encoder")
        == any("the head is left out: elsewhere" in note for note in found.notes)
        == (len(more) > 1)
    )
    if found.kind == "classifier":
        model = models_vit.create_model("vit_mini_patch4", num_classes=3, global_pool=False).eval()
        model.load_state_dict(formats.read(tmp_path / "timm.safetensors", "timm").state)
        whole = models_vit.create_model("vit_mini_patch4", num_classes=3, global_pool=False).eval()
        models_vit.add_probe_head(whole, batch_norm=False)
        whole.load_state_dict(checkpoint.load(tmp_path / checkpoint.LAST)["model"])
        with torch.no_grad():
            torch.testing.assert_close(model(images), whole(images))
