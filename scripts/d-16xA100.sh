#!/usr/bin/env bash
# Decentralized data parallel training under SLURM, on 4 nodes x 4 A100. From the root of the repository:
#   mkdir -p log
#   sbatch -A PROJECT scripts/d-16xA100.sh $(which torchrun) config/decent-gpt2-small.toml [KEY=VALUE ...]
# The job has the #SBATCH options of 16xA100.sh under another name, and then runs it: backend and topology are in the
# configuration. alternating-exp-ring needs an even number of nodes.
#SBATCH --job-name=d-gpt2-small
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=2-00:00:00
#SBATCH --output=log/%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
exec bash "${SLURM_SUBMIT_DIR:-.}/scripts/16xA100.sh" "$@"
