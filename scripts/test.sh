#!/usr/bin/env bash
# Installs what is missing and runs the whole test suite; arguments go to pytest.
#   bash scripts/test.sh
#   bash scripts/test.sh tests/test_model.py -k generate
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
use_environment tests/requirements.txt
export OMP_NUM_THREADS=1 # several workers share the cores
exec python -m pytest -m "not slow and not slurm and not gpu" "$@"
