"""GPU tests run where there is a GPU; the tests that wait longest begin first."""

import pytest
import torch

_SLOWEST = "test_slurm.py"


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name != _SLOWEST)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
