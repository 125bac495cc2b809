#!/usr/bin/env bash
# Pre-train on the 8 GPUs of one machine, or as many as $GPUS says; the effective batch is the recipe's either way.
# Usage: scripts/pretrain_8gpu.sh CONFIG DATA_PATH OUTPUT_DIR [more flags]
#   scripts/pretrain_8gpu.sh configs/pretrain/vitb16_sbam_amr.yaml /data/imagenet output/vitb16 --seed 1
. "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh"
run_main main_pretrain.py "config data_path output_dir" "$@"
