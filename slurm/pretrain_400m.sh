#!/bin/bash
# Pretrain CHIAR-Former 400M: sbatch slurm/pretrain_400m.sh [--set KEY=VALUE ...]
#
# One task per GPU. Change the size on the command line (sbatch --nodes=4 slurm/pretrain_400m.sh); the batch of the config
# must divide over the ranks. On nodes without GPUs: sbatch --gres=none --ntasks-per-node=2 ...; ranks are CPU processes.
# Two minutes before the time limit, or when the job is preempted, the ranks save, and the job is requeued and goes on.

#SBATCH --job-name=megachiar-400m
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out

source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh" || exit 2
pretrain configs/400m.yaml "$@"
