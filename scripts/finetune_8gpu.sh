#!/usr/bin/env bash
# Fine-tune on the 8 GPUs of one machine, or as many as $GPUS says; the effective batch is the recipe's either way.
# Usage: scripts/finetune_8gpu.sh CONFIG CHECKPOINT DATA_PATH OUTPUT_DIR [more flags]
#   scripts/finetune_8gpu.sh configs/finetune/vitb16.yaml output/pre/checkpoint-last.pth /data/imagenet output/finetune
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." >/dev/null && pwd)
names=(CONFIG CHECKPOINT DATA_PATH OUTPUT_DIR)
arguments=("$@")
for i in "${!names[@]}"; do
  if [[ -z ${arguments[i]:-} || ${arguments[i]} == -* ]]; then
    name=$(basename "$0")
    echo "$name: ${names[i]}, argument $((i + 1)), is missing; usage: $name ${names[*]} [more flags]" >&2
    exit 2
  fi
done
config=$1 checkpoint=$2 data=$3 output=$4
shift 4
if [[ -d $root/.venv/bin ]]; then
  export PATH="$root/.venv/bin:$PATH"
fi
exec torchrun --standalone --nproc_per_node="${GPUS:-8}" "$root/main_finetune.py" \
  --config "$config" --finetune "$checkpoint" --data_path "$data" --output_dir "$output" "$@"
