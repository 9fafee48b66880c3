#!/usr/bin/env bash
# All-Reduce data parallel training under SLURM, on 4 nodes x 4 A100. From the root of the repository:
#   mkdir -p log
#   sbatch -A PROJECT scripts/16xA100.sh $(which torchrun) config/gpt2-small.toml [KEY=VALUE ...]
# Without log/ SLURM fails the job before this script starts, and leaves no output that says why.
# Output goes to log/<job id>.out, the run's files to log/<job id>/. Two days are enough for 600,000 steps on A100s.
# What #SBATCH asks for can be changed on the command line, and the run adapts:
#   sbatch -A PROJECT --nodes=2 --gpus-per-node=A100:2 --cpus-per-task=16 --time=1:00:00 scripts/16xA100.sh ...
# A run that needs more than the time limit is submitted once. Five minutes before the end (--signal) the workers save
# and end, and the job requeues itself. It resumes at the next step. So --time must be well above five minutes; for
# less, change both: --time=5:00 --signal=B:USR1@60.
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
port=$((20000 + SLURM_JOB_ID % 10000)) # a port for each job, below the ports that Linux hands out itself
gpus=${SLURM_GPUS_PER_NODE##*:} # number behind A100: in A100:4; SLURM_GPUS_ON_NODE counts the whole node where nodes are not shared
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((SLURM_CPUS_PER_TASK / gpus))}"

# One torchrun on each node starts one worker for each GPU. USR1 would kill torchrun, which therefore ignores it.
# When one node fails, the job fails.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    bash -c 'trap "" USR1; exec "$@"' bash \
    "$torchrun" --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="$gpus" \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="${hosts%%$'\n'*}:$port" \
    train.py "$@" &
srun=$!

# When the job is stopped, workers must save and end. They do so on USR1, which srun passes on to them. USR1 is sent
# again every half minute, for a worker that is still starting misses it.
requeue=no
stop_workers() { while kill -USR1 "$srun"; do sleep 30; done &>/dev/null & }
trap 'requeue=yes; stop_workers' USR1 # the time limit is near
trap stop_workers TERM                # cancelled or preempted: SLURM requeues a preempted job itself
while kill -0 "$srun" 2>/dev/null; do wait "$srun" || true; done # a trap ends a wait early
wait "$srun" # srun has ended: returns its exit code, which becomes the script's unless it is 0

# The job is not requeued for ever: workers that end with exit code 0 have saved at least one new step, or have just
# finished the run. After a finished run the job starts once again, and ends at once.
if [ "$requeue" = yes ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
