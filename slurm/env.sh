# The one file to edit for your cluster. Every slurm/*.sh sources it, on the node where the batch script runs and, through
# srun, on every node of the job. Paths are relative to the folder you submit from (the checkout).

# Software: modules to load, and the virtual environment that `pip install -c constraints.txt -e .` was run in.
# module load cuda/13.0
VENV="${VENV:-.venv}"
source "$VENV/bin/activate"

# Network: NCCL and gloo must find the interface that joins the nodes. `ip addr` on a compute node lists them.
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0

# A run that was killed (node failure, dead rank) is requeued so many times before it is left as failed. Stops by the
# time limit or by preemption are saved, requeued and not counted.
MAX_RESTARTS="${MAX_RESTARTS:-5}"
