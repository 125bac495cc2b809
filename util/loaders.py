"""Ready-made `--loader` functions for what Pillow does not read: a path -> pixels (H, W, C)."""

from __future__ import annotations

import numpy as np


def npy(path: str) -> np.ndarray:
    """Read an array (H, W) or (H, W, C) that numpy.save wrote; nothing in the file is executed."""
    return np.load(path, allow_pickle=False)


def tiff(path: str) -> np.ndarray:
    """Read a TIFF of any depth and number of bands, (H, W) or (H, W, C); planes in the first axis become the last."""
    try:
        import tifffile
    except ImportError as error:
        raise ImportError("--loader util.loaders:tiff needs tifffile: pip install tifffile") from error
    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        pixels = series.asarray()
        axes = series.axes.replace("Q", "S").replace("C", "S").replace("I", "S")
    return np.moveaxis(pixels, 0, -1) if pixels.ndim == 3 and axes[0] == "S" else pixels


npy.extensions = (".npy",)
tiff.extensions = (".tif", ".tiff")
