#!/usr/bin/env bash
# Sourced by the other scripts: makes .venv ($VENV) in the project's folder, once, and puts it first in PATH.
# Usage: . scripts/setup.sh REQUIREMENTS_FILE...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
venv=${VENV:-.venv}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "$python is $("$python" --version 2>&1); Python 3.10 or later is needed: set PYTHON=/path/to/python3" >&2
  exit 2
}
# The stamp names what was installed, so that a changed requirements file is noticed and an interrupted install redone.
stamp=$(cat "$@" | sha256sum | cut -d' ' -f1)
if [ ! -e "$venv/installed-$stamp" ]; then
  echo "setting up $venv (PyTorch with CUDA is about 6 GB; a few minutes, once)"
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check $(printf -- '-r %s ' "$@")
  touch "$venv/installed-$stamp"
fi
export PATH="$(cd "$venv/bin" && pwd):$PATH"
