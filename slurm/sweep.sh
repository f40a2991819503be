#!/bin/bash
# Train one cell of a sweep on all ranks of this job: `megachiar sweep SWEEP --slurm` queues it as an array.
#
#   sbatch --array=0-5 slurm/sweep.sh SWEEP CELLS      task i trains the cell that line i + 1 of the file CELLS names
#
# From the top folder of the checkout, after editing slurm/env.sh. Options for sbatch go into `slurm:` of the sweep's
# file, such as --nodes=1 --ntasks-per-node=8 --gres=gpu:8. A task that was stopped before its cell is finished is
# requeued as other runs are, and goes on from the last save.

#SBATCH --job-name=megachiar-sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A-%a.out

# sbatch runs a copy of this file from its spool folder: only the folder of submission leads to the checkout.
cd "${SLURM_SUBMIT_DIR:-.}" && [ -f megachiar/pretrain.py ] && source slurm/common.sh || {
    echo "error: $PWD is not the megachiar checkout: cd there, then megachiar sweep SWEEP --slurm" >&2
    exit 2
}
[ $# = 2 ] || fail "usage: sbatch --array=0-N slurm/sweep.sh SWEEP CELLS"
load_environment
cell=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$2") || exit $EXIT_USER_ERROR
[ -n "$cell" ] || fail "$2 has no line $((SLURM_ARRAY_TASK_ID + 1))"
config=$(python -m megachiar sweep "$1" --cell "$cell") || exit
[ -n "$config" ] || exit 0
pretrain "$config"
