"""Features, k-NN, effective rank and probes against independent implementations, and what they leave untouched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import tiny_mae, varied_images
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from evaluation import features, probes


def blobs(n: int, seed: int, classes: int = 4, width: int = 12, spread: float = 1.6):
    """Labelled features of overlapping classes."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    labels = rng.integers(0, classes, n)
    points = centres[labels] + spread * rng.normal(size=(n, width))
    return torch.tensor(points, dtype=torch.float32), torch.tensor(labels)


@pytest.mark.parametrize("shape", [(50, 20), (20, 50)])
def test_rank_me_is_the_entropy_of_the_singular_values(shape):
    points = np.random.default_rng(0).normal(size=shape) * np.linspace(0.01, 3, shape[1])
    centred = points - points.mean(0)  # scikit-learn's PCA centres, so both get centred features
    singular = PCA().fit(centred).singular_values_
    share = singular / singular.sum()
    share = share[share > 1e-12]
    expected = np.exp(-(share * np.log(share)).sum())
    assert features.rank_me(torch.tensor(centred)) == pytest.approx(expected, rel=1e-4)


def test_rank_me_counts_equal_directions_and_collapse():
    assert features.rank_me(torch.eye(7).repeat(3, 1)) == pytest.approx(7, rel=1e-4)
    assert features.rank_me(torch.ones(30, 9)) == pytest.approx(1, rel=1e-4)
    assert np.isfinite(features.rank_me(torch.zeros(30, 9)))


def test_knn_is_a_vote_of_the_nearest_by_cosine_weighted_by_distance():
    train, val = blobs(200, 0), blobs(80, 1)
    ours = features.knn_accuracy(train, val, neighbours=7)
    a, b = (part[0].double() / part[0].double().norm(dim=1, keepdim=True) for part in (train, val))
    right = 0
    for i in range(len(b)):  # the definition, image by image
        distance = 1 - a @ b[i]
        nearest = distance.argsort()[:7]
        votes = torch.zeros(4, dtype=torch.float64).index_add(0, train[1][nearest], 1 / distance[nearest])
        right += int(votes.argmax() == val[1][i])
    assert ours == pytest.approx(100 * right / 80, abs=1e-6)
    assert 40 < ours < 99
    assert features.knn_accuracy((train[0][:3], train[1][:3]), val) >= 0  # fewer images than neighbours


def test_the_linear_probe_is_as_good_as_logistic_regression():
    train, val = blobs(600, 0, spread=2.0), blobs(400, 1, spread=2.0)
    scaler = StandardScaler().fit(train[0].numpy())
    model = LogisticRegression(max_iter=500).fit(scaler.transform(train[0].numpy()), train[1].numpy())
    expected = 100 * model.score(scaler.transform(val[0].numpy()), val[1].numpy())
    found = probes.linear_probe((1000 * train[0] + 5, train[1]), (1000 * val[0] + 5, val[1]), lr=1e-2)
    assert 40 < expected < 95
    assert abs(found - expected) < 2.5


def test_the_attentive_probe_finds_what_the_mean_hides():
    """Every image has one token that tells its class; the others' noise drowns it in the mean."""
    generator = torch.Generator().manual_seed(0)

    def images(n):
        labels = torch.randint(0, 3, (n,), generator=generator)
        tokens = 0.7 * torch.randn(n, 24, 16, generator=generator)
        place = torch.randint(0, 24, (n,), generator=generator)
        tokens[torch.arange(n), place] = 6 * torch.eye(16)[labels] + 6 * torch.eye(16)[15]
        return tokens, labels

    train, val = images(600), images(300)
    means = [(tokens.mean(1), labels) for tokens, labels in (train, val)]
    attentive = probes.attentive_probe(train, val, epochs=12, lr=3e-3)
    assert attentive > probes.linear_probe(*means) + 5


def test_probes_leave_the_random_state_alone_and_repeat():
    train, val = blobs(100, 0), blobs(50, 1)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = probes.linear_probe(train, val, epochs=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert probes.linear_probe(train, val, epochs=2) == first


class Pictures(torch.utils.data.Dataset):
    """Seven images, asked with (epoch, index)."""

    images = varied_images(7)

    def __len__(self):
        return 7

    def __getitem__(self, key):
        assert key[0] == 0
        return self.images[key[1]], key[1]


@pytest.mark.parametrize("pool", features.POOLS)
def test_features_are_those_of_each_image_alone(pool):
    torch.manual_seed(0)
    model = tiny_mae()
    before = torch.get_rng_state()
    found, labels = features.extract_features(model, Pictures(), lambda x: x, pool=pool, batch_size=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert labels.tolist() == list(range(7))
    with torch.no_grad():
        tokens = model.encode(model.embed(Pictures.images[4:5]), None)[0]
    expected = {"mean": tokens[1:].mean(0), "cls": tokens[0], "tokens": tokens[1:]}[pool]
    torch.testing.assert_close(found[4], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="choose one of mean, cls, tokens"):
        features.encode_images(model, Pictures.images, "max")
