"""What an encoder knows: features of unmasked images, k-NN accuracy on them, and their effective rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from util.data.step_loader import evaluation_loader

POOLS = ("mean", "cls", "tokens")


@torch.no_grad()
def encode_images(model: nn.Module, images: torch.Tensor, pool: str = "mean") -> torch.Tensor:
    """Compute features of whole, unmasked images.

    Args:
        model: `models_mae.MaskedAutoencoderViT`, as it is (`model.eval()` is the caller's).
        images: (N, C, H, W), normalised, on the model's device.
        pool: "mean" of the patch tokens, the "cls" token, or the patch "tokens" themselves; after the final norm.

    Returns:
        (N, embed_dim), or (N, L, embed_dim) for the tokens.
    """
    if pool not in POOLS:
        raise ValueError(f"pool is {pool!r}; choose one of {', '.join(POOLS)}")
    tokens = model.encode(model.embed(images), None)  # (N, L + 1, D)
    if pool == "cls":
        return tokens[:, 0]
    return tokens[:, 1:].mean(dim=1) if pool == "mean" else tokens[:, 1:]


@torch.no_grad()
def extract_features(
    model: nn.Module,
    dataset: Dataset,
    normalize: Callable[[torch.Tensor], torch.Tensor],
    *,
    pool: str = "mean",
    batch_size: int = 256,
    num_workers: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute features of all images of a data set with a masked autoencoder's encoder. Draw no random number.

    Args:
        model: `models_mae.MaskedAutoencoderViT`; put into evaluation mode.
        dataset: answers `dataset[epoch, index]` with an image (C, H, W) and a class.
        normalize: images -> normalised images, on the model's device.
        pool: as for `encode_images`.
        batch_size, num_workers: of the loading.

    Returns:
        features (n, embed_dim), or (n, L, embed_dim), and classes (n,), on the CPU.
    """
    model.eval()
    device = next(model.parameters()).device
    features, labels = [], []
    loader = evaluation_loader(dataset, range(len(dataset)), batch_size=batch_size, num_workers=num_workers)
    for images, targets in loader:
        features.append(encode_images(model, normalize(images.to(device)), pool).cpu())
        labels.append(targets)
    return torch.cat(features), torch.cat(labels)


def knn_accuracy(
    train: tuple[torch.Tensor, torch.Tensor], val: tuple[torch.Tensor, torch.Tensor], neighbours: int = 10
) -> float:
    """Return the percentage of `val` that its `neighbours` in `train` classify rightly: cosine, weighted by distance.

    Args:
        train, val: features (n, D) and classes (n,).
        neighbours: how many vote; all of `train` where it has fewer.
    """
    from sklearn.neighbors import KNeighborsClassifier  # takes seconds to import

    classifier = KNeighborsClassifier(min(neighbours, len(train[0])), metric="cosine", weights="distance")
    classifier.fit(train[0].numpy(), train[1].numpy())
    return 100 * classifier.score(val[0].numpy(), val[1].numpy())


@torch.no_grad()
def voting_accuracies(
    train: tuple[torch.Tensor, torch.Tensor],
    val: tuple[torch.Tensor, torch.Tensor],
    neighbours: Sequence[int] = (10, 20),
    temperature: float = 0.07,
    top: int = 1,
) -> list[float]:
    """Return the percentage of `val` that its nearest neighbours in `train` vote for, as DINO and iBOT measure it.

    A neighbour's vote is exp(cosine / temperature). Where a number of neighbours exceeds `train`, all of it votes.

    Args:
        train, val: features (n, D) and classes (n,).
        neighbours: numbers of neighbours; one accuracy for each.
        temperature: above 0.
        top: right is what is among the `top` classes with the most votes.
    """
    classes = int(torch.maximum(train[1].max(), val[1].max())) + 1
    known, right = (F.normalize(train[0].float(), dim=-1), train[1]), [0] * len(neighbours)
    for features, targets in zip(val[0].split(1000), val[1].split(1000), strict=True):
        for place, total in enumerate(class_votes(features, known, classes, neighbours, temperature)):
            best = total.argsort(dim=1, descending=True, stable=True)[:, :top]
            right[place] += int((best == targets[:, None]).any(dim=1).sum())
    return [100 * number / len(val[0]) for number in right]


@torch.no_grad()
def class_votes(
    features: torch.Tensor,
    known: tuple[torch.Tensor, torch.Tensor],
    classes: int,
    neighbours: Sequence[int],
    temperature: float = 0.07,
) -> list[torch.Tensor]:
    """Sum the votes for each class of the nearest known features, (n, classes) for each number of neighbours.

    Args:
        features: (n, D), all compared at once with all known ones.
        known: unit vectors (m, D) and their classes (m,).
        classes: how many there are.
        neighbours, temperature: as for `voting_accuracies`.
    """
    cosine, index = (F.normalize(features.float(), dim=-1) @ known[0].T).topk(min(max(neighbours), len(known[0])))
    votes, voted = (cosine / temperature).exp(), known[1][index]
    none = votes.new_zeros(len(features), classes)
    return [none.scatter_add(1, voted[:, :number], votes[:, :number]) for number in neighbours]


def class_token_accuracies(
    train: tuple[torch.Tensor, torch.Tensor], val: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, float]:
    """Return `voting_accuracies` of 10 and 20 neighbours by name, as iBOT reports them."""
    return dict(zip(("knn_cls_10", "knn_cls_20"), voting_accuracies(train, val), strict=True))


def rank_me(features: torch.Tensor, epsilon: float = 1e-7) -> float:
    """Compute the effective rank of features (n, D), 1 (collapsed) to min(n, D): RankMe, Garrido et al., 2023, Eq. 1.

    The exponential of the entropy of the singular values' shares, each share plus `epsilon`, as there.
    """
    singular = torch.linalg.svdvals(features.double())
    share = singular / singular.sum().clamp_min(1e-300) + epsilon
    return torch.exp(-(share * share.log()).sum()).item()
