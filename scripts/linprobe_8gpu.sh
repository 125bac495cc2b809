#!/usr/bin/env bash
# Probe on the 8 GPUs of one machine, or as many as $GPUS says; the effective batch is the recipe's either way.
# Usage: scripts/linprobe_8gpu.sh CONFIG FINETUNE DATA_PATH OUTPUT_DIR     (FINETUNE: the pre-trained checkpoint) [more flags]
#   scripts/linprobe_8gpu.sh configs/linprobe/vitb16.yaml output/vitb16/checkpoint-last.pth /data/imagenet output/vitb16_lp
. "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh"
run_main main_linprobe.py "config finetune data_path output_dir" "$@"
