"""AM and AMT: maps of the whole data set, crops of them, masks with thrown tokens, and runs that continue."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
from faults import injected
from helpers import golden, log_lines, refusal, tiny_mae, varied_images, write_pictures
from reference import amt
from runs import assert_same_run, content, flags, pretrain, stopped, torchrun

import main_pretrain
import masking
from masking.attention import attention_map, crop_map
from methods import attention_maps
from util.attention import weights_of_first

INPUTS = ("config", "map_images", "images", "image_size", "crop_box", "flip")
AMT = ["--masking", "amt", "--masking_args", "refresh_epochs=1", "--mask_ratio", 0.85, "--epochs", 4]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), classes=1, per_class=10)


def maps(output) -> list[str]:
    return sorted(path.name for path in output.glob("attention_maps*"))


def test_everything_against_the_goldens():
    data = golden("amt_tiny")
    given = {
        k: v for k, v in data.items() if k in INPUTS or k.startswith("state/") or k.endswith(("exponential", "ratios"))
    }
    found = amt.compute(given)
    assert found.keys() == data.keys() - given.keys()
    for name, value in found.items():
        expected, tolerance = data[name], 1e-4 if "/grad" in name else 1e-5
        if expected.dtype.kind in "bi":
            np.testing.assert_array_equal(value, expected, err_msg=name)
        else:
            bound = tolerance * max(np.abs(expected).max(), 1e-3)
            np.testing.assert_allclose(value, expected, rtol=0, atol=bound, err_msg=name)


def test_the_reference_counts_as_the_release():
    data = golden("amt_tiny") | {"amt/ratios": np.array([1 / 7, 2 / 7])}
    mask = amt.compute(data)["amt/mask"]
    assert {tuple((row == value).sum() for value in (1, -1, 0)) for row in mask} == {(28, 56, 112)}


def test_a_head_that_attends_to_all_alike_is_no_zero_over_zero():
    flat = torch.full((1, 2, 16), 1 / 16)
    assert (attention_map(flat) == 1).all()


def test_autocast_does_not_round_the_scores_of_attention():
    """Scores of 10 in bf16 are off by up to 2%, and weights by as much; which patches come first would change."""
    torch.manual_seed(0)
    query, key = 2 * torch.randn(2, 3, 4, 9, 80, dtype=torch.bfloat16)  # (N, H, K, d) each
    with torch.autocast("cpu", torch.bfloat16):
        found = weights_of_first(query, key, 80**-0.5)
    expected = (query[:, :, :1].double() @ key.double().transpose(2, 3) * 80**-0.5).softmax(dim=-1)[:, :, 0]
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-7)


def test_the_crop_of_a_map_is_where_the_crop_of_the_image_is():
    """A map with one bright cell: the crop of its quarter is bright, flipped to the other side, or dark elsewhere."""
    whole = torch.zeros(1, 4, 4)
    whole[0, 0, 0] = 1
    boxes = torch.tensor([[0, 0, 30, 50, 60, 100, 0], [0, 0, 30, 50, 60, 100, 1], [30, 50, 30, 50, 60, 100, 0.0]])
    found = crop_map(whole.expand(3, -1, -1), boxes, (32, 32), (8, 8))
    assert found[0].argmax() == 0
    assert found[1].argmax() == 3
    assert found[2].abs().max() == 0
    assert found[0, 0, 0] == pytest.approx(64, rel=0.01)


def test_counts_of_amt_are_the_papers():
    tokens, offered = torch.zeros(2, 196, 4), {"maps": torch.rand(2, 14, 14)}
    boxes = torch.tensor([0.0, 0, 50, 50, 100, 100, 0]).expand(2, -1)
    amt_mask = masking.call(masking.create("amt"), tokens, grid=(14, 14), patch_size=(16, 16), boxes=boxes, **offered)
    assert amt_mask.num_keep.tolist() == [30, 30]
    assert amt_mask.host_thrown == (78, 78)
    assert amt_mask.predicted.sum(dim=1).tolist() == [88, 88]
    am_mask = masking.call(masking.create("am"), tokens, grid=(14, 14), patch_size=(16, 16), boxes=boxes, **offered)
    assert am_mask.num_keep.tolist() == [49, 49]
    assert am_mask.thrown is None


def test_a_bright_patch_is_removed_more_often():
    whole = torch.full((4000, 4, 4), 0.1)
    whole[:, 1, 2] = 1
    box = torch.tensor([0.0, 0, 8, 8, 8, 8, 0]).expand(4000, -1)
    strategy = masking.create("am", mask_ratio=0.25)
    share = masking.call(
        strategy, torch.zeros(4000, 16, 1), grid=(4, 4), patch_size=(2, 2), maps=whole, boxes=box
    ).mask.float()
    share = share.mean(dim=0)
    assert share[6] > 0.6
    assert share[[0, 3, 12, 15]].max() < 0.3


def test_class_attention_is_what_the_last_block_computes():
    model, images = tiny_mae().eval(), varied_images(3)
    block, seen = model.blocks[-1], []
    hook = block.attn.attn_drop.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    block.attn.fused_attn = False
    with torch.no_grad():
        model.encode(model.embed(images), None)
    hook.remove()
    torch.testing.assert_close(model.class_attention(images), seen[0][:, :, 0, 1:])


def test_maps_are_of_the_whole_image_as_the_model_sees_it(pictures, tmp_path):
    pretrain(pictures, tmp_path, *AMT, "--epochs", 3)
    assert maps(tmp_path) == ["attention_maps-1.npy"]
    found = np.load(tmp_path / "attention_maps-1.npy")
    assert found.shape == (10, 4, 4)
    assert found.dtype == np.float16
    assert 0 <= found.min() < found.max() <= 1


@pytest.mark.parametrize("forward", [3, 5, 10], ids=lambda forward: f"step {forward}")
def test_a_run_with_maps_continues_bit_for_bit(pictures, tmp_path, forward):
    pretrain(pictures, tmp_path / "whole", *AMT)
    assert maps(tmp_path / "whole") == ["attention_maps-1.npy", "attention_maps-2.npy"]
    with injected([{"kind": "SIGTERM", "forward": forward}]):
        stopped(pictures, tmp_path / "parts", *AMT)
    pretrain(pictures, tmp_path / "parts", *AMT)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    for name in maps(tmp_path / "whole"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_a_signal_while_maps_are_made_costs_only_them(pictures, tmp_path, monkeypatch):
    pretrain(pictures, tmp_path / "whole", *AMT)
    crop, calls = attention_maps.Squash.__call__, []

    def interrupt(self, pixels):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return crop(self, pixels)

    monkeypatch.setattr(attention_maps.Squash, "__call__", interrupt)
    stopped(pictures, tmp_path / "parts", *AMT)
    saved = content(tmp_path / "parts")
    assert (saved["epoch"], saved["step"]) == (0, 6)  # the second epoch's steps are done, its maps are not
    assert maps(tmp_path / "parts") == []
    pretrain(pictures, tmp_path / "parts", *AMT)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("most", [0.0, 0.2])
def test_an_image_that_fails_while_maps_are_made_is_named_and_counted(pictures, tmp_path, monkeypatch, capsys, most):
    squash, calls = attention_maps.Squash.__call__, []

    def failing(self, pixels):
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("a disk that fails for a moment")
        return squash(self, pixels)

    monkeypatch.setattr(attention_maps.Squash, "__call__", failing)
    given = [*AMT, "--epochs", 3, "--max_bad_images", most]
    if most:
        pretrain(pictures, tmp_path, *given)
        assert [line["train_bad_images"] for line in log_lines(tmp_path)] == [0, 1, 1]
    else:
        with pytest.raises(SystemExit):
            pretrain(pictures, tmp_path, *given)
        assert maps(tmp_path) == []
    assert f"{pictures}/train/class0/" in capsys.readouterr().err


def test_two_processes_make_the_same_maps(pictures, tmp_path):
    given = [*AMT, "--epochs", 3, "--effective_batch_size", 4]
    pretrain(pictures, tmp_path / "one", *given)
    result = torchrun(pictures, tmp_path / "two", [], *given, "--batch_size", 2)
    assert result.returncode == 0, result.stderr
    assert maps(tmp_path / "two") == ["attention_maps-1.npy"]
    one, two = (np.load(tmp_path / name / "attention_maps-1.npy") for name in ("one", "two"))
    np.testing.assert_allclose(one.astype(np.float32), two.astype(np.float32), atol=2e-3)


@pytest.mark.parametrize(("processes", "name"), [(1, "attention_maps-1.npy"), (2, "attention_maps-1.npy.part1")])
def test_maps_that_cannot_be_written_end_all_processes_with_one_sentence(pictures, tmp_path, capsys, processes, name):
    """A folder that has the file's name stands for a full disk: root may write anywhere."""
    (tmp_path / name).mkdir(parents=True)
    given = [*AMT, "--epochs", 3, "--effective_batch_size", 4, "--batch_size", 4 // processes]
    if processes == 1:
        with pytest.raises(SystemExit) as stop:
            pretrain(pictures, tmp_path, *given)
        assert stop.value.code == 1
        said = capsys.readouterr().err
    else:
        result = torchrun(pictures, tmp_path, [], *given)
        assert result.returncode
        said = result.stderr
        assert "IsADirectoryError" not in said
    assert said.count(f"--output_dir {tmp_path}: the attention maps could not be written ([Errno 21]") == 1
    saved = content(tmp_path)
    assert (saved["epoch"], saved["step"]) == (0, 6)
    (tmp_path / name).rmdir()
    assert len(pretrain(pictures, tmp_path, *given)) == 3


def test_a_run_too_short_for_maps_says_so(pictures, tmp_path, capsys):
    pretrain(pictures, tmp_path, *AMT, "--epochs", 2)
    assert "no attention maps will be made: the first are due after epoch 1" in capsys.readouterr().out


def test_a_finished_run_needs_no_maps_any_more_and_a_longer_schedule_those_it_left_out(pictures, tmp_path, capsys):
    pretrain(pictures, tmp_path, *AMT, "--epochs", 3)
    assert len(pretrain(pictures, tmp_path, *AMT, "--epochs", 3)) == 3
    said = refusal(main_pretrain.main, flags(pictures, tmp_path, *AMT), capsys)
    assert "attention_maps-2.npy: there is no such file" in said
    assert "a schedule that ends after epoch 2 does not make them" in said


def test_maps_that_are_missing_or_others_are_named(pictures, tmp_path, capsys):
    with injected([{"kind": "SIGTERM", "forward": 10}]):
        stopped(pictures, tmp_path, *AMT)
    path = tmp_path / "attention_maps-2.npy"
    again = flags(pictures, tmp_path, *AMT)
    whole = path.read_bytes()
    np.save(path, np.ones((9, 4, 4), np.float16))
    assert "holds maps (9, 4, 4) of float16, not (10, 4, 4)" in refusal(main_pretrain.main, again, capsys)
    path.write_bytes(whole[:100])
    assert "is no file of attention maps" in refusal(main_pretrain.main, again, capsys)
    path.unlink()
    said = refusal(main_pretrain.main, again, capsys)
    assert "attention_maps-2.npy: there is no such file" in said
    assert "copy it from the folder of the checkpoint" in said


@pytest.mark.parametrize("names", ["b.jpg", None], ids=["renamed", "fewer"])
def test_maps_are_of_the_images_that_they_were_made_of(tmp_path, capsys, names):
    """Between two epochs images may change, but not where the next epoch needs a map of each."""
    folder = write_pictures(tmp_path / "pictures", classes=1, per_class=10)
    pretrain(folder, tmp_path / "run", *AMT, "--stop_after_epoch", 1)
    pretrain(folder, tmp_path / "early", *AMT, "--stop_after_epoch", 0)
    picture = folder / "train" / "class0" / "3.jpg"
    picture.rename(picture.with_name(names)) if names else picture.unlink()
    pretrain(folder, tmp_path / "early", *AMT)  # has no maps yet
    said = refusal(main_pretrain.main, flags(folder, tmp_path / "run", *AMT), capsys)
    changed = "the 10 of --data_path have other names" if names else "10 images, and --data_path has 9"
    assert changed in said
    assert "maps that the next epoch needs are of the former: continue with the images it had, or start a new" in said


def test_random_masking_at_its_own_ratio_comes_first(pictures, tmp_path):
    lines = pretrain(pictures, tmp_path, *AMT, "--epochs", 2, "--masking_warmup_epochs", 1)
    assert [line["train_mask_ratio"] for line in lines] == [0.75, 13 / 16]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 0.4}, "throw_ratio is 0.4, but mask_ratio 0.4 counts all removed"),
        ({"throw_ratio": -0.1}, "throw_ratio must be at least 0"),
        ({"throw_ratio": "much"}, "throw_ratio is 'much'"),
        ({"refresh_epochs": 0}, "refresh_epochs is 0"),
        ({"refresh_epochs": 1.5}, "refresh_epochs is 1.5"),
        ({"released_crop": "yes"}, "released_crop is 'yes'"),
        ({"warmup_ratio": 1}, "warmup_ratio is 1"),
    ],
)
def test_impossible_options_are_one_clear_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        masking.create("amt", **options)
