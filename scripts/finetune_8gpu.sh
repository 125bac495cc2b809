#!/usr/bin/env bash
# Fine-tune on the 8 GPUs of one machine, or as many as $GPUS says; the effective batch is the recipe's either way.
# Usage: scripts/finetune_8gpu.sh CONFIG FINETUNE DATA_PATH OUTPUT_DIR     (FINETUNE: the pre-trained checkpoint) [more flags]
#   scripts/finetune_8gpu.sh configs/finetune/vitb16.yaml output/vitb16/checkpoint-last.pth /data/imagenet output/vitb16_ft
. "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh"
run_main main_finetune.py "config finetune data_path output_dir" "$@"
