#!/bin/bash
# Pretrain the attention-only baseline of the 400M model: sbatch slurm/pretrain_400m_baseline.sh [--set KEY=VALUE ...]
#
# From the top folder of the checkout, after editing slurm/env.sh. One task per GPU; sbatch's own flags change the size:
#   sbatch --nodes=4 slurm/pretrain_400m_baseline.sh    32 GPUs (the batch must divide over them)
#   sbatch --nodes=2 --gres=none --ntasks-per-node=2 slurm/pretrain_400m_baseline.sh    4 ranks on CPUs
# Two minutes before the time limit the ranks save, and the job is requeued and goes on where it was. A step and a save
# must fit into that time: sbatch --signal=B:USR1@600 gives ten minutes. To make a running job save and start again at
# once:
#   scancel --batch --signal=USR1 JOB

#SBATCH --job-name=megachiar-400m_baseline
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out

# sbatch runs a copy of this file from its spool folder: only the folder of submission leads to the checkout.
cd "${SLURM_SUBMIT_DIR:-.}" && [ -f megachiar/pretrain.py ] && source slurm/common.sh || {
    echo "error: $PWD is not the megachiar checkout: cd there, then sbatch slurm/..." >&2
    exit 2
}
pretrain configs/400m_baseline.yaml "$@"
