"""GPU tests run where there is a GPU; the tests that wait longest begin first; pictures for short runs."""

import pytest
import torch
from helpers import write_pictures

_SLOWEST = "test_slurm.py"


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name != _SLOWEST)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """26 training pictures."""
    return write_pictures(tmp_path_factory.mktemp("pictures"), per_class=13, size=(20, 24))
