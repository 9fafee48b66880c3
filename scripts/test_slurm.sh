#!/usr/bin/env bash
# Tests the two sbatch scripts, unchanged, on a real SLURM that runs on this machine for the time of the tests: five
# nodes with declared GPUs, on which a tiny GPT-2 trains on CPUs. Takes a quarter of an hour on two cores. Needs root,
# the Debian packages slurm-wlm, munge and iproute2, and a machine without GPUs. Arguments go to pytest.
#   bash scripts/test_slurm.sh
#   bash scripts/test_slurm.sh -k "time_limit or crash"     # only these; --collect-only names all
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
use_environment tests/requirements.txt
python data/sotu/prepare.py
export OMP_NUM_THREADS=1 # several workers share the cores
exec python -m pytest -m slurm tests/slurm "$@"
