"""The masked autoencoder against golden numbers, against each image alone, and against independent implementations."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import timm
import torch
from helpers import MODEL_STRATEGIES, golden, golden_json, tensor, tiny_mae, varied_images
from torch import nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

import masking
import models_mae
import models_vit
from util.training import fitting


def golden_mae(norm_pix_loss: bool) -> models_mae.MaskedAutoencoderViT:
    data = golden("mae_tiny")
    config = json.loads(str(data["config"]))
    norm_layer = partial(nn.LayerNorm, eps=config.pop("layer_norm_eps"))
    strategy = masking.create("random", mask_ratio=float(data["mask_ratio"]))
    model = models_mae.MaskedAutoencoderViT(
        **config, norm_layer=norm_layer, norm_pix_loss=norm_pix_loss, masking=strategy
    )
    state = {name.removeprefix("state/"): tensor(data[name]) for name in data if name.startswith("state/")}
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_forward_and_gradients_against_the_goldens(norm_pix_loss):
    data, model = golden("mae_tiny"), golden_mae(norm_pix_loss)
    prefix = "norm_pix/" if norm_pix_loss else "raw_pix/"
    loss, pred, mask = model(tensor(data["images"]), noise=tensor(data["noise"]))
    loss.backward()
    np.testing.assert_allclose(loss.item(), data[f"{prefix}loss"], rtol=1e-5)
    np.testing.assert_allclose(pred.detach(), data["pred"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(mask.float(), data["mask"])
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert {f"{prefix}grad/{name}" for name in gradients} == {n for n in data if n.startswith(f"{prefix}grad/")}
    for name, gradient in gradients.items():
        expected = data[f"{prefix}grad/{name}"]
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max(), err_msg=name)


def test_latent_ranking_and_patches_against_the_goldens():
    data, model = golden("mae_tiny"), golden_mae(True)
    images = tensor(data["images"])
    mask = model.choose_mask(images, tensor(data["noise"]))
    latent = model.forward_encoder(images, mask)
    np.testing.assert_allclose(latent.detach(), data["latent"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(mask.ids_restore, data["ids_restore"])
    np.testing.assert_array_equal(model.patchify(images), data["patchify"])
    assert torch.equal(model.unpatchify(model.patchify(images)), images)


@pytest.mark.parametrize("name", ["mae_vit_base_patch16", "mae_vit_large_patch16", "mae_vit_huge_patch14"])
def test_state_dict_layout_is_the_published_one(name):
    with torch.device("meta"):
        state = models_mae.create_model(name).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == golden_json("mae_state_dict_layouts")[name]


COUNTS = [[5, 5, 5, 5], [1, 63, 20, 20], [1, 1, 63, 63], [63, 2, 31, 1], [10], [3, 4]]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_packed_equals_each_image_alone(counts, norm_pix_loss):
    """The plainest reference: every image by itself, dense, with its own number of kept tokens."""
    torch.manual_seed(0)
    model = tiny_mae(norm_pix_loss=norm_pix_loss)
    images, scores = varied_images(len(counts) + 1)[1:], torch.rand(len(counts), 64)

    def keep(indices):
        num_keep = torch.tensor([counts[i] for i in indices])
        return lambda tokens, noise=None: masking.mask_from_scores(scores[indices], num_keep)

    model.masking = keep(list(range(len(counts))))
    loss, pred, mask = model(images)
    loss.backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    total = 0.0
    for i, count in enumerate(counts):
        model.masking = keep([i])
        assert model.choose_mask(images[i : i + 1]).keep_lengths is None
        alone, alone_pred, alone_mask = model(images[i : i + 1])
        assert torch.equal(alone_mask[0], mask[i])
        assert alone_mask.sum() == 64 - count
        torch.testing.assert_close(alone_pred[0], pred[i], rtol=1e-5, atol=1e-5)
        total = total + alone * (64 - count)
    total = total / mask.sum()
    total.backward()
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, together[name], rtol=1e-5, atol=1e-5, msg=name)


def test_amr_drops_tokens_for_each_image():
    torch.manual_seed(0)
    model = tiny_mae(masking=masking.create("sbam_amr"))
    mask = model.choose_mask(varied_images(6))
    latent = model.forward_encoder(varied_images(6), mask)
    assert len(set(mask.num_keep.tolist())) > 2
    assert latent.shape == (mask.num_keep.sum() + 6, 48)


@pytest.mark.parametrize("name", MODEL_STRATEGIES)
def test_every_strategy_trains(name):
    model = tiny_mae(masking=masking.create(name), norm_pix_loss=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = varied_images(8)
    losses = []
    for _ in range(8):
        torch.manual_seed(0)
        loss, _, _ = model(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", MODEL_STRATEGIES)
def test_a_strategy_with_parameters_does_not_enter_the_state_dict(name):
    class Module(nn.Linear):
        def forward(self, tokens, noise=None):
            return masking.create(name)(tokens, noise=noise)

    model = tiny_mae(masking=Module(48, 1))
    assert model.state_dict().keys() == tiny_mae().state_dict().keys()
    assert model(varied_images(2))[0].isfinite()


@pytest.mark.parametrize("name", MODEL_STRATEGIES)
def test_any_grid_and_channels(name):
    model = tiny_mae(img_size=(24, 40), patch_size=(4, 8), in_chans=2, masking=masking.create(name))
    loss, pred, mask = model(torch.randn(2, 2, 24, 40))
    assert pred.shape == (2, 30, 4 * 8 * 2)
    assert mask.shape == (2, 30)
    assert loss.isfinite()
    images = torch.randn(2, 2, 24, 40)
    assert torch.equal(model.unpatchify(model.patchify(images)), images)


def test_masks_do_not_depend_on_autocast():
    """Half precision in the patch embedding would change which tokens look salient."""
    model, images = tiny_mae(masking=masking.create("sbam_amr")), varied_images(6) * 5
    noise = torch.rand(6, 64)
    _, _, plain = model(images, noise)
    with torch.autocast("cpu", torch.bfloat16):
        _, pred, cast = model(images, noise)
    assert pred.dtype == torch.bfloat16
    assert torch.equal(plain, cast)


@pytest.mark.parametrize("name", MODEL_STRATEGIES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiling_changes_no_mask_and_no_number(name, backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model, images, noise = tiny_mae(masking=masking.create(name)), varied_images(32), torch.rand(32, 64)
    names = list(model.state_dict())
    batches = [slice(0, 8), slice(8, 16), slice(16, 24), slice(24, 32), slice(4, 12), slice(12, 20), slice(0, 5)]

    def results() -> list[torch.Tensor]:
        found = []
        for batch in batches:
            model.zero_grad()
            loss, pred, mask = model(images[batch], noise[batch])
            loss.backward()
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            found += [loss.detach(), pred.detach(), mask, *gradients]
        return found

    plain = results()
    model.compile_blocks(backend=backend)
    torch.testing.assert_close(results(), plain, rtol=1e-5, atol=1e-6)
    assert list(model.state_dict()) == names
    # Two sizes of the batch: decoder and loss. Encoder: one for each dense shape. Where counts vary, the loss has one;
    # the encoder one for all packed batches, and two for all dense ones (the first block's input is a view).
    counts = [tuple((~mask).sum(dim=1).tolist()) for mask in plain[2 :: len(plain) // len(batches)]]
    dense = {count for count in counts if len(set(count)) == 1}
    packed = {sum(count) for count in counts if len(set(count)) > 1}
    varies = name == "sbam_amr"
    assert (len(packed) > 4) == varies
    assert len(dense) >= 1
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 2 + (1 + 1 + 2 if varies else 2 + len(dense))
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize(
    ("name", "options"), [("sbam_amr", {"delta_r": 0.24}), ("block", {"attempts": 3, "min_patches": 4})]
)
def test_batches_of_one_image_need_no_graph_for_each_count(name, options):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model = tiny_mae(masking=masking.create(name, **options), norm_pix_loss=True)
    images = varied_images(1) + torch.randn(30, 3, 32, 32) * torch.rand(30, 1, 1, 1) * torch.rand(30, 1, 32, 32) ** 8
    masks = [model.choose_mask(image, torch.rand(1, 64)) for image in images.split(1)]
    assert len({int(mask.num_keep) for mask in masks}) > 8
    plain = [model.forward_masked(*pair)[0] for pair in zip(images.split(1), masks, strict=True)]
    model.compile_blocks(backend="aot_eager")
    compiled = [model.forward_masked(*pair)[0] for pair in zip(images.split(1), masks, strict=True)]
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


@pytest.mark.parametrize("name", MODEL_STRATEGIES)
def test_grad_checkpointing_changes_nothing(name):
    torch.manual_seed(0)
    model, images, noise = tiny_mae(masking=masking.create(name)), varied_images(6), torch.rand(6, 64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images, noise)[0].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_a_strategy_that_reads_no_tokens_gets_their_shape():
    class Blind:
        reads_tokens = False

        def __call__(self, tokens, noise=None):
            seen.append(tokens.shape)
            return masking.create("random")(tokens, noise=noise)

    seen = []
    model = tiny_mae(masking=Blind())
    model(varied_images(3))
    assert seen == [(3, 64, 48)]


def test_bf16_is_close_to_fp32():
    model, images, noise = tiny_mae(masking=masking.create("sbam_amr")), varied_images(6), torch.rand(6, 64)
    exact = model(images, noise)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(images, noise)[0]
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=1e-2, atol=0)


def hugging_face_copy(model: models_mae.MaskedAutoencoderViT, norm_pix_loss: bool) -> ViTMAEForPreTraining:
    """Hugging Face's implementation with our weights."""
    config = ViTMAEConfig(
        image_size=32,
        patch_size=4,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        layer_norm_eps=1e-6,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=128,
        mask_ratio=0.75,
        norm_pix_loss=norm_pix_loss,
    )
    other = ViTMAEForPreTraining(config).eval()
    theirs = other.state_dict()
    ours = model.state_dict()
    renamed = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj.weight": "vit.embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "vit.embeddings.patch_embeddings.projection.bias",
        "norm.weight": "vit.layernorm.weight",
        "norm.bias": "vit.layernorm.bias",
        "mask_token": "decoder.mask_token",
        "decoder_pos_embed": "decoder.decoder_pos_embed",
    }
    for name, value in ours.items():
        if name in renamed:
            theirs[renamed[name]] = value
        elif name.startswith(("decoder_embed", "decoder_norm", "decoder_pred")):
            theirs[f"decoder.{name}"] = value
    for block in {
        name.rsplit(".", 2)[0].removesuffix(".attn").removesuffix(".mlp") for name in ours if "blocks" in name
    }:
        _copy_block(ours, theirs, block)
    other.load_state_dict(theirs)
    return other


def _copy_block(ours: dict, theirs: dict, block: str) -> None:
    kind, index = block.split(".")
    place = f"vit.encoder.layer.{index}" if kind == "blocks" else f"decoder.decoder_layers.{index}"
    if f"{place}.layernorm_before.weight" not in theirs:  # the name differs between versions
        place = f"vit.layers.{index}" if kind == "blocks" else f"decoder.layers.{index}"
    width = ours[f"{block}.norm1.weight"].shape[0]
    used = {key for key in theirs if key.startswith(f"{place}.")}
    find = lambda *parts: next(key for key in used if all(part in key for part in parts))  # noqa: E731
    for leaf in ("weight", "bias"):
        for i, part in enumerate(("q", "k", "v")):
            names = [
                f"{place}.attention.attention.{word}.{leaf}"
                for word in ({"q": "query", "k": "key", "v": "value"}[part],)
            ]
            names.append(f"{place}.attention.{part}_proj.{leaf}")
            key = next(name for name in names if name in theirs)
            theirs[key] = ours[f"{block}.attn.qkv.{leaf}"][i * width : (i + 1) * width]
        theirs[find("layernorm_before", leaf)] = ours[f"{block}.norm1.{leaf}"]
        theirs[find("layernorm_after", leaf)] = ours[f"{block}.norm2.{leaf}"]
        output = f"{place}.attention.output.dense.{leaf}"
        theirs[output if output in theirs else f"{place}.attention.o_proj.{leaf}"] = ours[f"{block}.attn.proj.{leaf}"]
        first = f"{place}.intermediate.dense.{leaf}"
        theirs[first if first in theirs else f"{place}.mlp.fc1.{leaf}"] = ours[f"{block}.mlp.fc1.{leaf}"]
        second = f"{place}.output.dense.{leaf}"
        theirs[second if second in theirs else f"{place}.mlp.fc2.{leaf}"] = ours[f"{block}.mlp.fc2.{leaf}"]


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_hugging_face_agrees(norm_pix_loss):
    torch.manual_seed(0)
    model = tiny_mae(norm_pix_loss=norm_pix_loss, masking=masking.create("random")).eval()
    other = hugging_face_copy(model, norm_pix_loss)
    images, noise = varied_images(3), torch.rand(3, 64)
    loss, pred, mask = model(images, noise)
    result = other(images, noise=noise)
    torch.testing.assert_close(result.loss, loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.logits, pred, rtol=1e-4, atol=1e-4)
    assert torch.equal(result.mask.bool(), mask)


def test_timm_gives_the_same_features():
    torch.manual_seed(0)
    model = models_mae.mae_vit_base_patch16().eval()
    other = timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=0).eval()
    state = {name: value for name, value in model.state_dict().items() if name in other.state_dict()}
    assert not other.load_state_dict(state).missing_keys
    classifier = models_vit.create_model("vit_base_patch16", num_classes=10, global_pool=False).eval()
    classifier.load_state_dict(fitting.fit_classifier(classifier, model.state_dict()), strict=False)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        ours = model.encode(model.embed(images), None)
        torch.testing.assert_close(other.forward_features(images), ours, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(classifier.forward_features(images), ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 30}, "not a whole number of patches"),
        ({"img_size": (32, 34)}, "width of 34"),
        ({"patch_size": 0}, "patches of 0"),
        ({"embed_dim": 50}, "not divisible by num_heads"),
        ({"embed_dim": 6, "num_heads": 3}, "multiple of 4"),
        ({"in_chans": 0}, "at least one channel"),
        ({"patch_size": 1, "in_chans": 1, "norm_pix_loss": True}, "no deviation"),
    ],
)
def test_impossible_sizes_are_one_clear_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_mae(**options)


def test_initial_weights_have_the_published_distribution():
    torch.manual_seed(0)
    model = tiny_mae(embed_dim=192, num_heads=3)
    weight = model.blocks[0].mlp.fc1.weight
    bound = (6 / (192 + 768)) ** 0.5
    assert 0.98 * bound < weight.abs().max() <= bound
    patch = model.patch_embed.proj.weight
    assert patch.abs().max() <= (6 / (192 + 48)) ** 0.5
    assert all((m.bias == 0).all() for m in model.modules() if isinstance(m, nn.Linear))
    assert abs(model.mask_token.std() - 0.02) < 0.01
    assert not model.pos_embed.requires_grad
    assert not model.decoder_pos_embed.requires_grad


def test_the_patch_embedding_as_a_matrix_product():
    """What a GPU computes in place of the convolution, here for patches that are not square."""
    torch.manual_seed(0)
    model = tiny_mae(img_size=(32, 16), patch_size=(8, 4))
    images = torch.randn(3, 3, 32, 16)
    product = torch.nn.functional.linear(model.patchify(images), model._patch_weight(), model.patch_embed.proj.bias)
    torch.testing.assert_close(product, model.patch_embed(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", ["random", "sbam"])
def test_images_of_other_sizes_are_refused(strategy):
    model = tiny_mae(masking=masking.create(strategy))
    height, width = model.patch_embed.img_size
    same_number_of_patches = torch.zeros(2, 3, height // 2, width * 2)
    for images in (same_number_of_patches, torch.zeros(2, 1, height, width), torch.zeros(2, 3, height, width).byte()):
        with pytest.raises(ValueError, match=rf"the model takes \(N, 3, {height}, {width}\)"):
            model(images)


@pytest.mark.parametrize("strategy", ["random", "sbam"])
def test_weights_in_double_precision_and_images_of_any_float_type(strategy):
    model = tiny_mae(masking=masking.create(strategy))
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    noise = torch.rand(2, model.num_patches)
    loss, pred, mask = model(images, noise)
    for other in (model(images.double(), noise), model.double()(images, noise)):
        assert torch.equal(other[2], mask)
        torch.testing.assert_close(other[1].float(), pred, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other[0], loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("strategy", ["random", "sbam"])
def test_a_model_without_values_computes_shapes(strategy):
    model = tiny_mae(masking=masking.create(strategy)).to("meta")
    loss, pred, mask = model(torch.empty(2, 3, *model.patch_embed.img_size, device="meta"))
    assert pred.shape[:2] == mask.shape == (2, model.num_patches)
    assert loss.device.type == "meta"
