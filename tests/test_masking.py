"""The strategy contract, over the registry, and the arithmetic of SBAM and AMR against exact references."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import golden, masked, tensor

import masking

STRATEGIES = masking.available()


def some_tokens(num_images=5, num_tokens=60, dim=24, scale=0.4) -> torch.Tensor:
    """Tokens whose spread, and so whose share of salient ones, differs from image to image."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(num_images, num_tokens, dim, generator=generator)
    return tokens * scale * torch.arange(1, num_images + 1).view(-1, 1, 1)


def assert_valid(mask: masking.Mask, num_images: int, num_tokens: int) -> None:
    assert mask.mask.dtype == torch.bool
    assert mask.mask.shape == mask.ids_restore.shape == (num_images, num_tokens)
    assert mask.num_keep.dtype == mask.ids_keep.dtype == mask.ids_restore.dtype == torch.int64
    assert ((mask.num_keep >= 1) & (mask.num_keep < num_tokens)).all()
    assert torch.equal((~mask.mask).sum(1), mask.num_keep)
    assert torch.equal(mask.ids_restore.sort(dim=1).values, torch.arange(num_tokens).expand(num_images, -1))
    assert torch.equal(mask.mask, mask.ids_restore >= mask.num_keep[:, None])
    packed = mask.ids_keep.flatten()
    assert len(packed) == mask.num_keep.sum()
    for kept, removed, place in zip(packed.split(mask.num_keep.tolist()), mask.mask, mask.ids_restore, strict=True):
        assert not removed[kept].any()
        assert torch.equal(place[kept], torch.arange(len(kept)))  # in the order of the ranking


def test_the_three_strategies_are_registered():
    assert {"random", "sbam", "sbam_amr"} <= set(STRATEGIES)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("num_images", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_mask_is_a_permutation_with_the_stated_counts(name, num_images, dtype):
    tokens = some_tokens(num_images).to(dtype)
    assert_valid(masked(masking.create(name), tokens), num_images, 60)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("num_tokens", [16, 49, 196, 7 * 13])
def test_any_number_of_tokens(name, num_tokens):
    assert_valid(masked(masking.create(name), some_tokens(3, num_tokens)), 3, num_tokens)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_seed_or_the_noise_it_draws_gives_the_same_mask(name):
    tokens, strategy = some_tokens(), masking.create(name)
    torch.manual_seed(3)
    first = masked(strategy, tokens)
    torch.manual_seed(3)
    again = masked(strategy, tokens)
    torch.manual_seed(3)
    given = masked(strategy, tokens, noise=torch.rand(tokens.shape[:2]))
    other = masked(strategy, tokens)
    assert torch.equal(first.mask, again.mask)
    assert torch.equal(first.ids_restore, given.ids_restore)
    draws = name not in ("attmask_high", "attmask_low")  # attention alone decides
    assert torch.equal(first.ids_restore, other.ids_restore) != draws


@pytest.mark.parametrize("name", STRATEGIES)
def test_images_of_a_batch_do_not_influence_each_other(name):
    tokens, strategy = some_tokens(), masking.create(name)
    noise = torch.rand(tokens.shape[:2])
    batch = masked(strategy, tokens, noise=noise)
    for i in range(len(tokens)):
        alone = masked(strategy, tokens[i : i + 1], noise=noise[i : i + 1])
        assert torch.equal(alone.mask[0], batch.mask[i])
        assert alone.num_keep[0] == batch.num_keep[i]


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 45.0])
def test_flat_images_give_a_valid_mask(name, value):
    tokens = torch.full((3, 60, 24), value)
    mask = masked(masking.create(name), tokens)
    assert_valid(mask, 3, 60)
    assert (masking.token_salience(tokens) == 0).all()


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_gradient_and_no_autocast_reach_the_ranking(name):
    tokens, strategy = some_tokens(scale=8).requires_grad_(), masking.create(name)
    noise = torch.rand(tokens.shape[:2])
    plain = masked(strategy, tokens, noise=noise)
    with torch.autocast("cpu", torch.bfloat16):
        cast = masked(strategy, tokens, noise=noise)
    assert torch.equal(plain.ids_restore, cast.ids_restore)
    assert not plain.mask.requires_grad


def test_salience_against_the_goldens():
    data = golden("salience")
    salience = masking.token_salience(tensor(data["tokens"]))
    np.testing.assert_allclose(salience, data["salience"], rtol=1e-5, atol=1e-6)
    ratio = masking.adaptive_mask_ratio(
        salience, float(data["base_ratio"]), float(data["delta_r"]), float(data["delta"])
    )
    np.testing.assert_allclose(ratio, data["amr_ratio"], rtol=1e-6)


@pytest.mark.parametrize(("name", "prefix"), [("sbam", "fixed"), ("sbam_amr", "amr")])
def test_masks_against_the_goldens(name, prefix):
    data = golden("salience")
    noise = tensor(data["noise_uniform_0_half"]) * 2
    mask = masking.create(name, mask_ratio=float(data["base_ratio"]))(tensor(data["tokens"]), noise=noise)
    np.testing.assert_array_equal(mask.ids_restore.argsort(dim=1), data["ids_ascending"])
    np.testing.assert_array_equal(mask.num_keep, np.broadcast_to(data[f"{prefix}_num_keep"], 6))
    np.testing.assert_array_equal(mask.mask.float(), data[f"{prefix}_mask"])


def test_salience_runs_in_true_fp32_and_gives_the_settings_back(monkeypatch):
    seen = []
    softmax = torch.softmax

    def record(logits, dim):
        backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul)
        seen.append([logits.dtype, torch.is_autocast_enabled("cpu"), *(b.fp32_precision for b in backends)])
        return softmax(logits, dim=dim)

    monkeypatch.setattr(torch, "softmax", record)
    torch.set_float32_matmul_precision("medium")
    try:
        before = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
        with torch.autocast("cpu", torch.bfloat16):
            masking.token_salience(some_tokens().bfloat16())
        assert seen == [[torch.float32, False, "ieee", "ieee", "ieee"]]
        assert torch.get_float32_matmul_precision() == "medium"
        assert before == (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision)
        assert before[0] == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_salience_in_plain_numpy():
    tokens = some_tokens(2, 10, 4).double().numpy()
    for image, salience in zip(tokens, masking.token_salience(torch.from_numpy(tokens), 2.0), strict=True):
        logits = image @ image.T / 2.0
        weights = np.exp(logits - logits.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        columns = weights.sum(0)
        expected = (columns - columns.min()) / (columns.max() - columns.min())
        np.testing.assert_allclose(salience, expected, atol=1e-5)


def test_amr_counts_each_image_by_itself():
    tokens = some_tokens()
    mask = masking.create("sbam_amr")(tokens)
    assert len(set(mask.num_keep.tolist())) > 1
    share = (masking.token_salience(tokens) > 0.1).sum(1).tolist()
    expected = [math.ceil(60 * (1 - (Fraction("0.6") + Fraction("0.3") * Fraction(s, 60)))) for s in share]
    assert mask.num_keep.tolist() == expected
    assert mask.keep_lengths == tuple(expected)


def test_keep_count_is_exact():
    for length in range(1, 401):
        for hundredths in range(5, 100, 5):
            expected = -((-length * (100 - hundredths)) // 100)
            assert masking.keep_count(length, hundredths / 100) == expected


def test_published_keep_counts():
    published = {0.75: 49, 0.60: 79, 0.65: 69, 0.70: 59, 0.80: 40, 0.85: 30, 0.90: 20}
    assert {ratio: masking.keep_count(196, ratio) for ratio in published} == published


@pytest.mark.parametrize("num_tokens", [16, 64, 100, 196, 256])
def test_amr_counts_equal_rational_arithmetic_for_every_number_of_salient_tokens(num_tokens):
    strategy = masking.create("sbam_amr", mask_ratio=0.7, delta_r=0.1)
    counts = strategy.num_keep(torch.arange(num_tokens + 1), num_tokens).tolist()
    exact = [
        math.ceil(num_tokens * (1 - (Fraction(6, 10) + Fraction(2, 10) * Fraction(s, num_tokens))))
        for s in range(num_tokens + 1)
    ]
    assert counts == exact


def test_sbam_removes_the_salient_ones_without_randomness():
    tokens = some_tokens()
    mask = masking.create("sbam", randomness=0)(tokens)
    salience = masking.token_salience(tokens)
    for removed, values in zip(mask.mask, salience, strict=True):
        assert values[removed].min() >= values[~removed].max()


def test_equal_scores_keep_their_order():
    mask = masking.mask_from_scores(torch.zeros(2, 500), 100)
    assert torch.equal(mask.ids_restore, torch.arange(500).expand(2, -1))


def test_equal_counts_in_a_tensor_are_dense():
    scores = torch.rand(3, 10)
    one, several = masking.mask_from_scores(scores, 4), masking.mask_from_scores(scores, torch.tensor([4, 4, 4]))
    assert one.ids_keep.shape == several.ids_keep.shape == (3, 4)
    assert torch.equal(one.mask, several.mask)


@pytest.mark.parametrize("num_keep", [0, 10, torch.tensor([1, 10]), torch.tensor([0, 5])])
def test_keeping_none_or_all_is_an_error(num_keep):
    with pytest.raises(ValueError, match="at least one must be kept and one removed"):
        masking.mask_from_scores(torch.rand(2, 10), num_keep)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("random", {"mask_ratio": 1.0}, "mask_ratio is 1.0"),
        ("random", {"mask_ratio": 0}, "between 0 and 1"),
        ("random", {"mask_ratio": "half"}, "must be a number"),
        ("random", {"mask_ratio": "49/49"}, "between 0 and 1"),
        ("random", {"cell": 0}, "cell is 0"),
        ("sbam", {"rounding": "up"}, "rounding is 'up'"),
        ("sbam_amr", {"share_of": "images"}, "choose cells or tokens"),
        ("sbam", {"mask_ratio": float("nan")}, "between 0 and 1"),
        ("sbam", {"randomness": -1}, "randomness is -1"),
        ("sbam", {"temperature": 0}, "temperature is 0"),
        ("sbam_amr", {"mask_ratio": 0.9}, "ratios from 0.75 to 1.05"),
        ("sbam_amr", {"mask_ratio": 0.85}, "ratios from 0.7 to 1"),
        ("sbam_amr", {"delta_r": 0.75}, "ratios from 0 to 1.5"),
        ("sbam_amr", {"delta_r": "wide"}, "delta_r is 'wide'"),
        ("sbam", {"delta_r": 0.1}, "no option 'delta_r' \\(did you mean 'delta'"),
        ("sbam_arm", {}, "did you mean 'sbam_amr'"),
        ("no_such_package.file:Class", {}, "cannot be imported"),
        ("math:NoSuchClass", {}, "cannot be imported"),
    ],
)
def test_impossible_options_are_one_clear_sentence(name, options, message):
    with pytest.raises(ValueError, match=message):
        masking.create(name, **options)


def test_amr_on_too_few_tokens_is_a_clear_error():
    with pytest.raises(ValueError, match="of 3 tokens"):
        masking.check(masking.create("sbam_amr", mask_ratio=0.25, delta_r=0.2), 3)


def test_wrong_noise_shape():
    with pytest.raises(ValueError, match="noise has shape"):
        masking.create("random")(some_tokens(), noise=torch.rand(5, 3))


def test_a_registered_name_cannot_be_taken():
    with pytest.raises(ValueError, match="registered already"):
        masking.register("random")(type("Other", (), {}))


def test_a_strategy_from_a_users_own_file(tmp_path, monkeypatch):
    (tmp_path / "corner_masking.py").write_text(
        "import torch, masking\n"
        "class KeepFirst:\n"
        "    def __init__(self, mask_ratio): self.mask_ratio = mask_ratio\n"
        "    def __call__(self, tokens, noise=None):\n"
        "        scores = torch.arange(tokens.shape[1]).expand(tokens.shape[:2])\n"
        "        return masking.mask_from_scores(scores, masking.keep_count(tokens.shape[1], self.mask_ratio))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    mask = masking.create("corner_masking:KeepFirst", mask_ratio=0.5)(some_tokens())
    assert_valid(mask, 5, 60)
    assert not mask.mask[:, :30].any()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def __init__(self, mask_ratio, size): pass", "cannot be made from mask_ratio"),
        (
            "def __init__(self, mask_ratio): pass\n    def __call__(self, tokens, noise): return tokens.no",
            "AttributeError",
        ),
        ("def __init__(self, mask_ratio) pass", "cannot be imported"),
    ],
)
def test_a_users_strategy_that_fails_is_one_sentence(tmp_path, monkeypatch, body, message):
    name = f"faulty_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(f"class Mine:\n    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=message):
        masking.check(masking.create(f"{name}:Mine", mask_ratio=0.5), 16)


def test_check_refuses_what_is_not_a_mask():
    with pytest.raises(ValueError, match=r"must return masking\.Mask"):
        masking.check(lambda tokens, noise=None: tokens, 16)


@pytest.mark.parametrize("counts", [[1, 3, 2], (1, 3, 2), np.array([1, 3, 2]), torch.tensor([1, 3, 2])])
def test_counts_of_each_image_may_be_any_sequence(counts):
    mask = masking.mask_from_scores(torch.rand(3, 5), counts)
    assert mask.num_keep.tolist() == [1, 3, 2]
    assert (~mask.mask).sum(dim=1).tolist() == [1, 3, 2]


@pytest.mark.parametrize("count", [2, np.int64(2), torch.tensor(2)])
def test_one_count_for_all_images_may_be_of_any_integer_type(count):
    assert masking.mask_from_scores(torch.rand(3, 5), count).ids_keep.shape == (3, 2)


def test_the_ratio_of_each_image_follows_from_exact_fractions():
    salience = torch.tensor([[0.0, 1.0, 0.5, 0.05]])
    ratio = masking.adaptive_mask_ratio(salience, "32/49", Fraction(1, 10), 0.1)
    assert ratio.item() == pytest.approx(32 / 49)
    torch.testing.assert_close(masking.adaptive_mask_ratio(salience, "3/4", "3/20", 0.7), torch.tensor([0.675]))


@pytest.mark.parametrize("grid", [(1, 2), (2, 1)])
@pytest.mark.parametrize("name", ["random", "sbam", "block", "inverse_block", "color"])
def test_two_patches_are_enough(name, grid):
    strategy = masking.create(name, mask_ratio=0.5)
    noise = torch.tensor([[0.1, 0.2], [0.6, 0.2], [0.9, 0.99]])
    mask = masking.call(strategy, torch.randn(3, 2, 4), noise, grid=grid)
    assert mask.num_keep.tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["random", "block", "inverse_block", "color"])
def test_a_single_patch_is_refused_in_one_sentence(name):
    with pytest.raises(ValueError, match="at least one must be kept and one removed"):
        masking.call(masking.create(name), torch.randn(2, 1, 4), torch.rand(2, 1), grid=(1, 1))


def test_tokens_without_values_have_a_mask_too():
    tokens = torch.empty(2, 8, 4, device="meta")
    assert masking.token_salience(tokens).shape == (2, 8)
    assert masking.create("sbam")(tokens).ids_keep.shape == (2, 2)
