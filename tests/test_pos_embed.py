"""Position tables against the goldens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import golden, tensor

from util.pos_embed import resize_pos_embed, sincos_2d


@pytest.mark.parametrize(("dim", "side"), [(768, 14), (1024, 14), (1280, 16), (48, 8)])
def test_tables_against_the_goldens(dim, side):
    data, key = golden("pos_embed"), f"d{dim}_g{side}"
    table = sincos_2d(dim, (side, side))[0]
    assert list(table.shape) == data[f"{key}/shape"].tolist()
    np.testing.assert_allclose(
        table.flatten()[tensor(data[f"{key}/index"])], data[f"{key}/value"], rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize(("name", "side"), [("14to24", 24), ("8to5", 5)])
def test_resizing_against_the_goldens(name, side):
    data = golden("pos_embed_interpolation")
    resized = resize_pos_embed(tensor(data[f"{name}/in"]), (side, side))
    np.testing.assert_allclose(resized, data[f"{name}/out"], rtol=1e-5, atol=1e-6)


def test_a_table_that_is_not_square():
    table = sincos_2d(16, (3, 5), cls_token=False)[0].reshape(3, 5, 16)
    assert torch.equal(table[0, :, :8], table[2, :, :8])  # the first half depends on the column only
    assert torch.equal(table[:, 0, 8:], table[:, 4, 8:])  # the second half on the row only
    square = sincos_2d(16, (5, 5), cls_token=False)[0].reshape(5, 5, 16)
    assert torch.equal(table, square[:3])


def test_a_width_that_does_not_divide():
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_2d(18, (2, 2))
