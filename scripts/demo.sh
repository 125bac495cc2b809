#!/usr/bin/env bash
# The main job on real pictures, on any machine: pre-train on handwritten digits, probe, fine-tune, compare.
# Usage: scripts/demo.sh [random|sbam|sbam_amr|all]     (default: sbam_amr)
# Writes output_demo/, prints a table, draws output_demo/<strategy>/masks.png; exit status 1 if pre-training did not help.
# `all` ends with a small sweep over mask ratios: its plot and its PIMR table.
strategy=${1:-sbam_amr}
case $strategy in
  all) strategies="random sbam sbam_amr" ;;
  random | sbam | sbam_amr) strategies=$strategy ;;
  *)
    echo "demo.sh: unknown strategy '$strategy'; choose random, sbam, sbam_amr or all" >&2
    exit 2
    ;;
esac
. "$(dirname "$0")/setup.sh" requirements.txt

# The pictures are tiny: a second thread costs more than it brings, and the loader needs the other core.
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
out=output_demo
rm -rf "$out"
mkdir -p "$out"

step() { # step NAME LOG COMMAND...: run it quietly, show the log where it fails
  local name=$1 log=$2
  shift 2
  printf '%-46s' "$name"
  local start=$SECONDS
  if ! "$@" >"$log" 2>&1; then
    echo "failed; the end of $log:"
    tail -n 20 "$log"
    exit 1
  fi
  echo "$((SECONDS - start)) s"
}
probe() { # probe NAME CHECKPOINT OUTPUT_DIR
  step "$1" "$3.log" python main_linprobe.py --config configs/linprobe/digits.yaml --finetune "$2" --output_dir "$3"
}

step "untrained encoder" "$out/untrained.log" \
  python main_pretrain.py --config configs/pretrain/digits.yaml --epochs 0 --output_dir "$out/untrained"
probe "untrained encoder: linear probe" "$out/untrained/checkpoint-last.pth" "$out/untrained_probe"
for strategy in $strategies; do
  run=$out/$strategy
  mkdir -p "$run"
  step "$strategy: pre-training" "$run/pretrain.log" \
    python main_pretrain.py --config configs/pretrain/digits.yaml --masking "$strategy" --output_dir "$run/pretrain"
  probe "$strategy: linear probe" "$run/pretrain/checkpoint-last.pth" "$run/probe"
  step "$strategy: fine-tuning" "$run/finetune.log" python main_finetune.py --config configs/finetune/digits.yaml \
    --finetune "$run/pretrain/checkpoint-last.pth" --output_dir "$run/finetune"
done
python scripts/demo_report.py "$out" $strategies

if [ "${1:-}" = all ]; then
  echo
  step "sweep: 3 strategies x 3 mask ratios" "$out/sweep.log" \
    python scripts/sweep.py configs/sweeps/digits_demo.yaml --output "$out/sweep" --parallel 2
  python scripts/plot.py "$out/sweep/results.csv" --x mask_ratio --y knn linear --lines masking --pimr \
    --output "$out/sweep.png"
  python scripts/pimr.py "$out/sweep/results.csv" --metric knn
fi
