"""Attention over sequences end to end against each sequence by itself; the variable-length kernel's call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from masking.sequences import Sequences
from util.packing import PackedLayout, packed_attention

LENGTHS = [(7,), (3, 3, 3), (1, 64, 20, 20, 5), (2, 1, 1, 9), (200, 129, 1)]  # above 128 a GPU has other kernels


def each_alone(qkv: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    outputs = []
    for part in qkv.split(lengths):
        query, key, value = part.permute(1, 2, 0, 3)  # each (H, length, d)
        outputs.append(F.scaled_dot_product_attention(query, key, value).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_packed_attention_and_its_gradient(lengths, compiled):
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, 2, 16, requires_grad=True)
    weight = torch.randn(sum(lengths), 2, 16)
    call = torch.compile(packed_attention, backend="aot_eager", fullgraph=True) if compiled else packed_attention
    together = call(qkv, PackedLayout.from_lengths(lengths, torch.device("cpu")))
    gradient = torch.autograd.grad((together * weight).sum(), qkv)[0]
    alone = each_alone(qkv, lengths)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad((alone * weight).sum(), qkv)[0], rtol=1e-5, atol=1e-6)


def test_the_operator_keeps_its_promises():
    qkv = torch.randn(12, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([5, 4, 3])
    torch.library.opcheck(torch.ops.sbam.attention_by_length.default, (qkv, lengths))
    assert torch.autograd.gradcheck(lambda x: torch.ops.sbam.attention_by_length(x, lengths), qkv)


def test_layouts_of_one_bound_differ_in_nothing_a_compiled_graph_depends_on():
    layouts = [PackedLayout.from_lengths(lengths, torch.device("cpu")) for lengths in [(50, 60), (20, 80), (128, 1)]]
    assert {layout.max_length for layout in layouts} == {128}
    assert PackedLayout.from_lengths((129, 1), torch.device("cpu")).max_length == 256
    assert layouts[1].offsets.tolist() == [0, 20, 100]


@pytest.mark.parametrize("keep_lengths", [None, (2, 4, 1)])
def test_kept_tokens_lie_where_they_should(keep_lengths):
    """L = 5; every place is worked out one by one."""
    lengths = keep_lengths or (3, 3, 3)
    ids = [torch.randperm(5)[:n].tolist() for n in lengths]
    ids_keep = torch.tensor(ids if keep_lengths is None else [*ids[0], *ids[1], *ids[2]])
    kept = Sequences.locate(ids_keep, torch.tensor(lengths), 5, keep_lengths)
    patches, rows, class_rows, slots = [], [], [], []
    for image, positions in enumerate(ids):
        class_rows.append(len(slots))
        slots.append(image * 6)
        for position in positions:
            patches.append(image * 5 + position)
            rows.append(len(slots))
            slots.append(image * 6 + 1 + position)
    assert kept.patches.tolist() == patches
    assert kept.rows.tolist() == rows
    assert kept.class_rows.tolist() == class_rows
    assert kept.slots.tolist() == slots
    assert (kept.layout is None) == (keep_lengths is None)


def test_half_precision_on_a_gpu_calls_the_variable_length_kernel():
    """No GPU needed: the shapes alone go through PyTorch's operator."""
    with FakeTensorMode(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        offsets = torch.tensor([0, 3, 7, 12], dtype=torch.int32, device="cuda")
        layout = PackedLayout(torch.tensor([3, 4, 5]), offsets, 128, flash=True)
        out = packed_attention(torch.randn(12, 3, 4, 64, device="cuda", dtype=torch.bfloat16), layout)
        assert (out.shape, out.dtype, out.device.type) == ((12, 4, 64), torch.bfloat16, "cuda")
