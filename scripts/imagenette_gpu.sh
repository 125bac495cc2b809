#!/usr/bin/env bash
# What one GPU can say about masks on photographs: three ViT-S/16 on Imagenette at 224 pixels, 200 epochs each.
# Usage: scripts/imagenette_gpu.sh [--dry_run | other flags of scripts/sweep.py]     with the Python that is active
# The same command continues. The settings, and what to compare with: configs/sweeps/imagenette_224.yaml.
set -euo pipefail
cd "$(dirname "$0")/.."
sweep=configs/sweeps/imagenette_224.yaml
if [[ " $* " != *" --dry_run "* && ! -d data/imagenette/train ]]; then
  echo "imagenette_gpu.sh: data/imagenette/train is not there; type: ln -s IMAGENETTE data/imagenette" >&2
  exit 2
fi
python scripts/sweep.py "$sweep" "$@"
[[ $# != 0 ]] || PATIENCE=${PATIENCE:-4} scripts/gpu_check.sh output/imagenette_224/gpu_check
