#!/usr/bin/env bash
# Run the tests with the oldest versions that requirements.txt admits, in a .venv-oldest of its own. Not part of CI:
# PyTorch is several GB. Arguments go to pytest: scripts/test_oldest.sh tests/test_cli.py
cd "$(dirname "$0")/.."
oldest=$(mktemp)
trap 'rm -f "$oldest"' EXIT
sed -E '/^#/d; s/>=([^,]*).*/==\1/' requirements.txt >"$oldest"
export VENV=.venv-oldest
. scripts/setup.sh "$oldest" requirements-dev.txt
export OMP_NUM_THREADS=1
python -m pytest --dist loadfile --no-loadscope-reorder -n 2 "$@"
