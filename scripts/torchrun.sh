# Sourced by the *_8gpu.sh scripts: torchrun of a main, whose first arguments have names here and are flags there.
# Usage: . scripts/torchrun.sh; run_main MAIN "FLAG FLAG ..." "$@"
set -euo pipefail

run_main() {
  local root main=$1 flags flag command=()
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." >/dev/null && pwd)
  read -ra flags <<<"$2"
  shift 2
  for flag in "${flags[@]}"; do
    if [[ -z ${1:-} || $1 == -* ]]; then
      echo "$(basename "$0"): the argument ${flag^^} is missing; usage: $(basename "$0") ${flags[*]^^} [more flags]" >&2
      exit 2
    fi
    command+=("--$flag" "$1")
    shift
  done
  if [[ -d $root/.venv/bin ]]; then
    export PATH="$root/.venv/bin:$PATH"
  fi
  exec torchrun --standalone --nproc_per_node="${GPUS:-8}" "$root/$main" "${command[@]}" "$@"
}
