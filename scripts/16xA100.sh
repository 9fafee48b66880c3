#!/usr/bin/env bash
# All-Reduce data parallel training under SLURM, on 4 nodes x 4 A100. From the root of the repository:
#   mkdir -p log
#   sbatch -A PROJECT scripts/16xA100.sh $(which torchrun) config/gpt2-small.toml [KEY=VALUE ...]
# Without log/ SLURM fails the job before this script starts, and leaves no output that says why.
# Output goes to log/<job id>.out, the run's files to log/<job id>/. Two days are enough for 600,000 steps on A100s.
# What #SBATCH asks for can be changed on the command line, and the run adapts:
#   sbatch -A PROJECT --nodes=2 --gpus-per-node=A100:2 --cpus-per-task=16 --time=1:00:00 scripts/16xA100.sh ...
#SBATCH --job-name=gpt2-small
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=2-00:00:00
#SBATCH --output=log/%j.out
#SBATCH --open-mode=append
set -euo pipefail

if [ -z "${SLURM_JOB_ID:-}" ] || [ $# -lt 2 ] || ! command -v "$1" >/dev/null; then
    echo "usage: sbatch -A PROJECT scripts/[d-]16xA100.sh \$(which torchrun) CONFIG.toml [KEY=VALUE ...]" >&2
    exit 2
fi
torchrun=$1
shift

cd "$SLURM_SUBMIT_DIR" # SLURM runs a copy of this file from a folder of its own
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 10000)) # one for each job, below the ports that Linux hands out itself
gpus=${SLURM_GPUS_PER_NODE##*:} # of A100:4; SLURM_GPUS_ON_NODE counts the whole node where nodes are not shared
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((SLURM_CPUS_PER_TASK / gpus))}"

# One torchrun on each node, which starts one worker for each GPU. When one node fails, so does the job.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    "$torchrun" --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="$gpus" \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="${hosts%%$'\n'*}:$port" \
    train.py "$@"
