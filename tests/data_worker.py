"""Pre-trains for one epoch of two steps on each of several sources, and notes which pictures this process loaded.

Run by test_data_sources.py under torchrun. Usage: data_worker.py SOURCES.json OUTPUT_DIR
"""

import json
import sys
from pathlib import Path

from torchvision.datasets import CIFAR10

import main_pretrain
from util.data.datasets import SeededImages
from util.distributed import world

# The test's own batches have other checksums than the published ones.
CIFAR10.train_list = [[name, None] for name, _ in CIFAR10.train_list]
CIFAR10.test_list = [[name, None] for name, _ in CIFAR10.test_list]
CIFAR10.meta = CIFAR10.meta | {"md5": None}


def main(sources: str, output: Path) -> None:
    load = SeededImages.__getitem__
    seen: list[str] = []

    def note(self, key):
        seen.append(self.images.source.name(key[1]))
        return load(self, key)

    SeededImages.__getitem__ = note
    finish, world.finish = world.finish, lambda: None  # one process group for all sources
    start = world.init
    device = start("cpu")
    world.init = lambda *_: device
    flags_by_name = json.loads(Path(sources).read_text())
    for name, flags in flags_by_name.items():
        seen.clear()
        main_pretrain.main([*flags, "--output_dir", str(output / "runs" / name)])
        (output / f"{name}-{world.rank()}.json").write_text(json.dumps(seen))
    try:
        main_pretrain.main(
            [*flags_by_name["few_bad"], "--max_bad_images", "0.05", "--output_dir", str(output / "runs" / "bad")]
        )
    except SystemExit as error:
        (output / f"stopped-{world.rank()}.json").write_text(json.dumps(error.code))
    finish()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
