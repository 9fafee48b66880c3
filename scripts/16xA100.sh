#!/usr/bin/env bash
# All-Reduce data parallel training under SLURM, on 4 nodes x 4 A100. From the root of the repository:
#   mkdir -p log
#   sbatch -A PROJECT scripts/16xA100.sh $(which torchrun) config/gpt2-small.toml [KEY=VALUE ...]
# Without log/ SLURM fails the job before this script starts, and leaves no output that says why.
# Output goes to log/<job id>.out, the run's files to log/<job id>/. Two days are enough for 600,000 steps on A100s.
# What #SBATCH asks for can be changed on the command line, and the run adapts:
#   sbatch -A PROJECT --nodes=2 --gpus-per-node=A100:2 --cpus-per-task=16 --time=1:00:00 scripts/16xA100.sh ...
# A run that needs more than the time limit is submitted once: five minutes before the end (--signal) the workers save
# and leave, and the job puts itself into the queue again. It goes on there at the step after the last one. So --time
# must be well above five minutes; for less, change both: --time=5:00 --signal=B:USR1@60.
#SBATCH --job-name=gpt2-small
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=2-00:00:00
#SBATCH --output=log/%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
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

# One torchrun on each node, which starts one worker for each GPU. torchrun itself would die of USR1, so that it is
# started with USR1 ignored. When one node fails, so does the job.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    bash -c 'trap "" USR1; exec "$@"' bash \
    "$torchrun" --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="$gpus" \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="${hosts%%$'\n'*}:$port" \
    train.py "$@" &
srun=$!

# Whoever stops the job wants the workers to save and leave, which they do on USR1; srun passes it on to them. Again
# after half a minute, for a worker that is still starting does not hear it.
requeue=no
stop_workers() { while kill -USR1 "$srun"; do sleep 30; done &>/dev/null & }
trap 'requeue=yes; stop_workers' USR1 # the time limit is near
trap stop_workers TERM                # cancelled or preempted: if it is to go on, SLURM requeues it
while kill -0 "$srun" 2>/dev/null; do wait "$srun" || true; done # a trap ends a wait early
wait "$srun" # of one that has ended: its exit code, which becomes the script's if it is not 0

# No circles: who leaves with exit code 0 has saved at least one new step, or has come to the end of the run at this
# very moment. Then the job starts once more, and ends at once.
if [ "$requeue" = yes ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
