#!/usr/bin/env bash
# Set up everything and run the linter and the tests. Arguments go to pytest: scripts/test.sh tests/test_masking.py -x
. "$(dirname "$0")/setup.sh" requirements.txt requirements-dev.txt
# Parallel test processes of several threads each would fight for the cores.
export OMP_NUM_THREADS=1
# On a machine with a GPU, too, these are the tests of the CPU; scripts/gpu_check.sh runs the others.
export CUDA_VISIBLE_DEVICES=
ruff check .
ruff format --check .
# One more than there are cores: some wait, for a signal, a time limit, a cluster.
python -m pytest --dist loadfile --no-loadscope-reorder -n "$(python -c 'import os; print(min(4, len(os.sched_getaffinity(0))) + 1)')" "$@"
