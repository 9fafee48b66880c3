#!/usr/bin/env bash
# Trains a small GPT-2 with four gossip workers on this machine, then shows its loss and what it writes.
#   bash scripts/quickstart.sh
#   bash scripts/quickstart.sh train.topology=ring     # any configuration key but log_dir and log.run_name
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
use_environment requirements.txt

python data/sotu/prepare.py

# A worker needs a GPU of its own: with fewer than four, all train on the CPU.
if [ "$(python -c 'import torch; print(torch.cuda.device_count())')" -lt 4 ]; then
    export CUDA_VISIBLE_DEVICES=""
fi
export OMP_NUM_THREADS=1 # the workers are the parallelism
run=quickstart-$(date +%Y%m%d-%H%M%S)
torchrun --standalone --nproc_per_node=4 train.py config/quickstart.toml "$@" log_dir=log log.run_name="$run"

echo
echo "The trained model writes:"
python scripts/sample.py "log/$run/best_model.pth" --prompt "My fellow Americans," --tokens 120
echo
echo "The loss, as a picture: $(python scripts/plot.py "log/$run")"
