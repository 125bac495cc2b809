"""What an encoder knows: features of unmasked images, and k-NN accuracy on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.utils.data import DataLoader, Dataset


class _InOrder(Dataset):
    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        return self.dataset[0, index]


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
    """Features of whole images from a masked autoencoder's encoder.

    Args:
        model: `models_mae.MaskedAutoencoderViT`; put into evaluation mode.
        dataset: answers `dataset[epoch, index]` with an image (C, H, W) and a class.
        normalize: images -> normalised images, on the model's device.
        pool: "mean" of the patch tokens, or the "cls" token, both after the final norm.
        batch_size, num_workers: of the loading.

    Returns:
        features (n, embed_dim) and classes (n,), on the CPU.
    """
    if pool not in ("mean", "cls"):
        raise ValueError(f"pool is {pool!r}; choose 'mean' or 'cls'")
    model.eval()
    device = next(model.parameters()).device
    features, labels = [], []
    for images, targets in DataLoader(_InOrder(dataset), batch_size=batch_size, num_workers=num_workers):
        tokens = model.encode(model.embed(normalize(images.to(device))), None)  # (N, L + 1, D)
        features.append((tokens[:, 1:].mean(dim=1) if pool == "mean" else tokens[:, 0]).cpu())
        labels.append(targets)
    return torch.cat(features), torch.cat(labels)


def knn_accuracy(
    train: tuple[torch.Tensor, torch.Tensor], val: tuple[torch.Tensor, torch.Tensor], neighbours: int = 10
) -> float:
    """Percent of `val` that its nearest `neighbours` in `train` classify rightly: cosine, weighted by distance.

    Args:
        train, val: features (n, D) and classes (n,).
        neighbours: how many vote.
    """
    classifier = KNeighborsClassifier(neighbours, metric="cosine", weights="distance")
    classifier.fit(train[0].numpy(), train[1].numpy())
    return 100 * classifier.score(val[0].numpy(), val[1].numpy())
