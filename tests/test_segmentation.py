"""Segmentation on frozen patch tokens: scores against scikit-learn and by hand, on files whose answer is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import refusal
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, jaccard_score
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

import models_mae
from evaluation import checkpoints, label_masks, measure, segmentation
from methods import base
from scripts import evaluate
from util.config import PretrainSettings
from util.training import checkpoint

COLOURS = np.array([[40, 40, 200], [200, 60, 40], [60, 180, 60]])
MODELS = [name for name in models_mae.available_models() if name.endswith("_mini_patch4")]
FOLDERS = {"voc": ("JPEGImages", "SegmentationClass"), "ade20k": ("images/{}", "annotations/{}")}
SIZE = (32, 48)  # of the images; the models' is 16 x 16, in 4 x 4 patches


def scene(rng: np.random.Generator, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """An image of two rectangles of whole patches on a ground, in colours and noise, and its labels 0, 1, 2."""
    labels = np.zeros((4, 4), dtype=np.uint8)
    for label in (1, 2):
        top, left = rng.integers(0, 3, 2)
        labels[top : top + 2, left : left + 2] = label
    labels = labels.repeat(SIZE[0] // 4, 0).repeat(SIZE[1] // 4, 1)
    image = COLOURS[labels] + rng.normal(0, noise, (*SIZE, 3))
    return image.clip(0, 255).astype(np.uint8), labels


def write_mask(path, labels: np.ndarray) -> None:
    """A PNG with a palette, as VOC's are."""
    mask = Image.fromarray(labels)
    mask.putpalette(bytes(reversed(range(256))) * 3)
    mask.save(path)


def write(folder, layout="voc", noise=10.0, counts=(30, 12)):
    """Real files, the first rows of each mask ignored, in one of the layouts. Returns the folder."""
    rng = np.random.default_rng(0)
    for split, name, count in zip(("train", "val"), ("training", "validation"), counts, strict=True):
        images, masks = (folder / place.format(name) for place in FOLDERS[layout])
        lists = folder / "ImageSets" / "Segmentation"
        for place in (images, masks, *[lists] * (layout == "voc")):
            place.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            image, labels = scene(rng, noise)
            labels[:3] = 255
            Image.fromarray(image).save(images / f"{split}_{index}.jpg", quality=95)
            write_mask(masks / f"{split}_{index}.png", labels)
        if layout == "voc":
            (lists / f"{split}.txt").write_text("".join(f"{split}_{index}\n" for index in range(count)))
    return folder


def untrained(folder, name="mae_vit_mini_patch4"):
    return checkpoints.untrained(name, data_path=str(folder))


def read(opened, split: str) -> tuple[list, np.ndarray, np.ndarray]:
    """Samples of a split, patch tokens (n * L, D), and labels (n * L,) of the pixel in the middle of each patch."""
    samples = label_masks.load(label_masks.find(opened.settings.data_path, split), opened.size, 3)
    tokens = segmentation.encode(opened, samples).flatten(0, 1).numpy()
    return samples, tokens, np.concatenate([sample.labels[4::8, 6::12].flatten() for sample in samples])


def upsampled(scores: np.ndarray) -> np.ndarray:
    """(n, 4, 4, C) -> (n, H, W, C): linear between the centres of the patches, constant beyond the outermost."""
    for axis, length in enumerate(SIZE, start=1):
        places = ((np.arange(length) + 0.5) * 4 / length - 0.5).clip(0, 3)
        low = np.minimum(places.astype(int), 2)
        share = (places - low).reshape([-1 if n == axis else 1 for n in range(4)])
        scores = scores.take(low, axis) * (1 - share) + scores.take(low + 1, axis) * share
    return scores


def expected_iou(samples: list, scores: np.ndarray) -> np.ndarray:
    """scikit-learn's intersections over unions, in percent, of scores (n * L, C)."""
    predicted = upsampled(scores.reshape(-1, 4, 4, scores.shape[-1])).argmax(-1)
    true = np.stack([sample.labels for sample in samples])
    return 100 * jaccard_score(true[true != 255], predicted[true != 255], average=None)


def test_scores_by_hand():
    """Truth 0 0 0 1 1 1, predicted 0 0 1 1 1 3: of class 0 2 of 3, of class 1 2 of 4, of class 3 0 of 1; no class 2."""
    confusion = torch.zeros(4, 4, dtype=torch.int64)
    for true, predicted in zip((0, 0, 0, 1, 1, 1), (0, 0, 1, 1, 1, 3), strict=True):
        confusion[true, predicted] += 1
    iou = segmentation.intersections_over_unions(confusion)
    np.testing.assert_allclose(iou, [200 / 3, 50, np.nan, 0])
    assert iou.nanmean().item() == pytest.approx((200 / 3 + 50) / 3)


def test_pixels_are_counted_as_scikit_learn_does(tmp_path):
    opened = untrained(write(tmp_path))
    samples, tokens, _ = read(opened, "val")
    weight = torch.randn(96, 3, generator=torch.Generator().manual_seed(0))
    classes = label_masks.Classes(samples, (255,))
    found = segmentation.confusions(opened, {"any": lambda tokens: tokens @ weight}, samples, classes)["any"]
    predicted = upsampled((tokens @ weight.numpy()).reshape(-1, 4, 4, 3)).argmax(-1)
    true = np.stack([sample.labels for sample in samples])
    expected = confusion_matrix(true[true != 255], predicted[true != 255])
    assert abs(found.numpy() - expected).sum() <= 4  # ties of rounded scores
    assert found.sum() == 12 * 29 * 48


def test_a_patch_has_its_most_frequent_label():
    labels = torch.randint(0, 4, (3, 6, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    patches = [labels[n, r : r + 3, c : c + 2].flatten() for n in range(3) for r in (0, 3) for c in (0, 2, 4, 6)]
    expected = [scipy.stats.mode(patch.numpy()).mode for patch in patches]
    assert segmentation.patch_labels(labels, (2, 4)).flatten().tolist() == expected


@pytest.mark.parametrize("layout", FOLDERS)
def test_the_knn_is_scikit_learn_s(tmp_path, layout):
    opened = untrained(write(tmp_path, layout, noise=120))
    found = segmentation.segment(opened, neighbours=7)
    _, tokens, labels = read(opened, "train")
    samples, queries, _ = read(opened, "val")
    distance, index = NearestNeighbors(n_neighbors=7, metric="cosine").fit(tokens).kneighbors(queries)
    votes = np.exp((1 - distance) / 0.07)[..., None] * (labels[index][..., None] == np.arange(3))
    expected = expected_iou(samples, votes.sum(1))
    np.testing.assert_allclose(found["iou_knn"], expected, atol=0.02)
    assert found["miou_knn"] == pytest.approx(expected.mean(), abs=0.02)
    assert 60 < found["miou_knn"] < 90


def test_the_linear_layer_is_as_good_as_a_logistic_regression_on_the_patches(tmp_path):
    opened = untrained(write(tmp_path, noise=250))
    found = segmentation.segment(opened)
    _, tokens, labels = read(opened, "train")
    samples, queries, _ = read(opened, "val")
    scaler = StandardScaler().fit(tokens)
    regression = LogisticRegression(C=0.1, max_iter=1000).fit(scaler.transform(tokens), labels)
    expected = expected_iou(samples, regression.decision_function(scaler.transform(queries)))
    assert expected.mean() < 90
    assert found["miou_linear"] == pytest.approx(expected.mean(), abs=4)


@pytest.mark.parametrize("name", MODELS)
def test_every_method_s_encoder_finds_what_there_is_and_no_more(tmp_path, name):
    """Rectangles of colours, of which a bilinear upsampling of 4 x 4 scores rounds the corners."""
    folder = write(tmp_path)
    settings = PretrainSettings(model=name, data_path="elsewhere")
    saved = {"model": base.build_model(settings).state_dict(), "args": settings.as_dict(), "grid": [4, 4]}
    checkpoint.save(tmp_path / "a.pth", saved)
    flags = [tmp_path / "a.pth", "--metrics", "segmentation", "--data_path", folder, "--output", tmp_path / "r.json"]
    evaluate.main([str(flag) for flag in flags])
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["train_images"], found["val_images"], found["num_classes"]) == (30, 12, 3)
    assert min(*found["iou_linear"], *found["iou_knn"]) > 85


def test_masks_of_other_images_cannot_be_found(tmp_path):
    folder = write(tmp_path)
    paths = sorted((folder / "SegmentationClass").glob("val_*.png"))
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, contents[1:] + contents[:1], strict=True):
        path.write_bytes(content)
    found = segmentation.segment(untrained(folder))
    assert max(found["miou_linear"], found["miou_knn"]) < 45


def relabel(folder, change) -> None:
    """Write all masks anew, in grey, `change` applied to their labels."""
    for path in folder.rglob("*.png"):
        Image.fromarray(change(np.asarray(Image.open(path)))).save(path)


def test_labels_that_do_not_count_are_no_class(tmp_path):
    opened = untrained(write(tmp_path, "ade20k"))
    whole = segmentation.segment(opened, train_images=20, val_images=6)
    assert (whole["train_images"], whole["val_images"], whole["num_classes"]) == (20, 6, 3)
    with_absent = segmentation.segment(opened, train_images=20, val_images=6, num_classes=5)
    assert with_absent["num_classes"] == 5
    assert with_absent["iou_knn"] == [*whole["iou_knn"], None, None]
    assert with_absent["miou_knn"] == pytest.approx(whole["miou_knn"])
    relabel(tmp_path, lambda labels: np.where(labels == 255, 0, labels + 1).astype(np.uint8))  # ADE20K: 0 is no class
    assert segmentation.segment(opened, train_images=20, val_images=6, ignored=(0,)) == whole
    assert segmentation.segment(opened, train_images=20, val_images=6, ignored=(0, 255), num_classes=3) == whole
    two = segmentation.segment(opened, ignored=(0, 1))
    assert two["num_classes"] == 2
    assert min(two["iou_knn"]) > 85


def test_strokes_that_are_the_most_frequent_label_nowhere_are_refused(tmp_path):
    opened = untrained(write(tmp_path, "ade20k"))

    def strokes(labels: np.ndarray) -> np.ndarray:
        thin = np.full_like(labels, 255)
        thin[4::8] = labels[4::8]
        return thin

    relabel(tmp_path, strokes)
    with pytest.raises(ValueError, match=r"train_0\.png: as in the other training masks, most pixels of each patch"):
        segmentation.segment(opened)


def test_masks_of_black_and_white(tmp_path):
    opened = untrained(write(tmp_path, "ade20k"))
    relabel(tmp_path, lambda labels: np.where(labels == 2, 255, 0).astype(np.uint8))
    found = segmentation.segment(opened, ignored=())
    assert found["num_classes"] == 2
    assert min(found["iou_knn"]) > 85
    with pytest.raises(ValueError, match=r"have the labels \[0, 255\] alone, .* --ignore_index 255 do not"):
        segmentation.segment(opened)


def test_files_read_by_several_threads_are_the_same(tmp_path):
    opened = untrained(write(tmp_path))
    pairs = label_masks.find(str(tmp_path), "train")
    for one, other in zip(*(label_masks.load(pairs, opened.size, 3, threads) for threads in (1, 4)), strict=True):
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.labels, other.labels)
        assert one.mask == other.mask


def resize(path) -> None:
    Image.open(path).resize((24, 32), Image.Resampling.NEAREST).save(path)


def put(pixels: np.ndarray):
    return lambda path: Image.fromarray(pixels).save(path)


GREY = np.zeros(SIZE, dtype=np.uint8)


@pytest.mark.parametrize(
    ("name", "spoil", "flags", "message"),
    [
        (
            "SegmentationClass/val_3.png",
            resize,
            [],
            "has 32 x 24 pixels, and its image {}/JPEGImages/val_3.jpg",
        ),
        ("SegmentationClass/val_3.png", put(GREY + 7), [], "has the label 7, which is none of the 3 classes (0 to 2)"),
        ("SegmentationClass/train_3.png", put(GREY + 7), ["--num_classes", 3], "the label 7, which is none of the 3"),
        ("SegmentationClass/val_3.png", put(GREY.astype(np.uint16) + 300), [], "has the label 300; labels are numbers"),
        ("SegmentationClass/val_3.png", put(np.zeros((*SIZE, 3), np.uint8)), [], "is a picture of 3 channels; write"),
        ("SegmentationClass/val_3.png", lambda path: path.write_bytes(b"?"), [], "cannot be decoded as a PNG"),
        ("SegmentationClass/val_3.png", lambda path: path.unlink(), [], "no such file; every image of the split val"),
        ("JPEGImages/train_3.jpg", lambda path: path.unlink(), [], "there is no such file; every image"),
        ("JPEGImages/train_3.jpg", lambda path: path.write_bytes(b"?"), [], "cannot be decoded (in no format"),
        ("ImageSets/Segmentation/val.txt", lambda path: path.write_text(""), [], "the split val has no image"),
        (
            "ImageSets/Segmentation/val.txt",
            lambda path: path.unlink(),
            [],
            "no images of the split val with label",
        ),
        (".", None, ["--data_path", "/nowhere"], "--data_path /nowhere: there is no such folder"),
        (".", None, ["--num_classes", 1], "--num_classes 1: choose 2 to 255"),
        (".", None, ["--ignore_index", 256], "--ignore_index 256: labels are numbers from 0 to 255"),
        (".", None, ["--neighbours", 0], "--neighbours 0: must be at least 1"),
        (".", None, ["--metrics", "knn", "segmentation"], "--metrics knn segmentation: segmentation needs label masks"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, monkeypatch, name, spoil, flags, message):
    folder = write(tmp_path, counts=(5, 5))
    if spoil is not None:
        spoil(folder / name)
    monkeypatch.setattr(segmentation, "encode", None)  # nothing is encoded
    given = ["--model", "mae_vit_mini_patch4", "--metrics", "segmentation", "--data_path", folder]
    said = refusal(evaluate.main, [*given, *flags], capsys)
    assert message.format(folder) in said
    if spoil is not None and "ImageSets" not in name:
        assert f"{folder / name}: " in said


def test_the_tokens_must_fit_the_memory(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "CACHE_GB", 1e-6)
    given = ["--model", "mae_vit_mini_patch4", "--metrics", "segmentation", "--data_path", write(tmp_path)]
    assert "--metrics segmentation: the patch tokens of 30 images" in refusal(evaluate.main, given, capsys)
