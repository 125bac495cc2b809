#!/usr/bin/env bash
# Pre-train on the 8 GPUs of one machine, or as many as $GPUS says; the effective batch is the recipe's either way.
# Usage: scripts/pretrain_8gpu.sh CONFIG DATA_PATH OUTPUT_DIR [more flags]
#   scripts/pretrain_8gpu.sh configs/pretrain/vitb16_sbam_amr.yaml /data/imagenet output/vitb16 --seed 1
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." >/dev/null && pwd)
names=(CONFIG DATA_PATH OUTPUT_DIR)
arguments=("$@")
for i in "${!names[@]}"; do
  if [[ -z ${arguments[i]:-} || ${arguments[i]} == -* ]]; then
    name=$(basename "$0")
    echo "$name: ${names[i]}, argument $((i + 1)), is missing; usage: $name ${names[*]} [more flags]" >&2
    exit 2
  fi
done
config=$1 data=$2 output=$3
shift 3
if [[ -d $root/.venv/bin ]]; then
  export PATH="$root/.venv/bin:$PATH"
fi
exec torchrun --standalone --nproc_per_node="${GPUS:-8}" "$root/main_pretrain.py" \
  --config "$config" --data_path "$data" --output_dir "$output" "$@"
