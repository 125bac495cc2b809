#!/usr/bin/env bash
# What a GPU alone can show, in about eighteen minutes: scripts/gpu_check.sh [FOLDER for the results, default output_gpu]
# The tests marked gpu, the benchmarks, and 200 steps of ViT-B with sbam_amr on real digits, compiled, whose loss must
# fall and whose graphs must not be compiled again after the first epoch. Uses the Python that is active. On a GPU that is
# slower than an H200: PATIENCE=4 scripts/gpu_check.sh waits four times as long for each part.
set -uo pipefail
out=$(realpath -m "${1:-$(dirname "$0")/../output_gpu}")
cd "$(dirname "$0")/.."
mkdir -p "$out"
failed=0
run() { # NAME SECONDS COMMAND...: output into a file, the status remembered
  local name=$1 limit=$(($2 * ${PATIENCE:-1})) status=0
  shift 2
  echo "== $name: $*"
  timeout "$limit" "$@" >"$out/$name.txt" 2>&1 || status=$?
  [[ $status != 124 ]] || echo "   not done after $limit s; PATIENCE=4 before the command waits four times as long"
  [[ $status == 0 ]] || { echo "   failed with status $status"; failed=1; }
  tail -n 40 "$out/$name.txt"
}
run tests 300 python -m pytest -m gpu -p no:cacheprovider tests/test_gpu.py
run train 400 python scripts/benchmark.py train --json "$out/train.json"
others="hpm simmim bootmae cmae" # iBOT has twelve views
run methods 90 python scripts/benchmark.py methods --methods $others --batch_size 256 --rounds 4 --json "$out/methods.json"
run ibot 120 python scripts/benchmark.py methods --methods ibot --batch_size 64 --rounds 4 --json "$out/ibot.json"
run methods_compiled 300 python scripts/benchmark.py methods --methods $others --batch_size 256 --rounds 4 --compile \
  --json "$out/methods_compiled.json"
run growth 60 python scripts/benchmark.py growth --models base --batch_size 64 --rounds 3 --json "$out/growth.json"
run save 60 python scripts/benchmark.py save --rounds 3 --json "$out/save.json"
rm -rf "$out/digits"
TORCH_LOGS=recompiles run digits 150 python main_pretrain.py --dataset digits --in_chans 1 --input_size 224 \
  --model mae_vit_base_patch16 --norm_pix_loss --masking sbam_amr --batch_size 256 --epochs 34 --warmup_epochs 4 \
  --blr 1.5e-4 --compile --exact_resize --num_workers 8 --print_freq 1 --output_dir "$out/digits"
python - "$out/digits/log.txt" "$out/digits.txt" <<'PYTHON' || failed=1
import json, re, sys
losses = [json.loads(line)["train_loss"] for line in open(sys.argv[1])]
text = open(sys.argv[2]).read()
after = text[text.index("epoch 1 ["):]
again = len(re.findall(r"Recompiling function", after))
print(f"loss of the first epoch {losses[0]:.4f}, of the last {losses[-1]:.4f}; recompilations after the first: {again}")
sys.exit(not losses[-1] < losses[0] or again > 0)
PYTHON
exit $failed
