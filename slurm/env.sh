# The one file to edit for your cluster. The batch scripts source it on the first node of a job, preprocess.sh where you
# call it too; srun carries the environment to the other nodes. Relative paths start at the checkout.

# Software: modules to load, and the virtual environment where `pip install -c constraints.txt -e .` was run. Every
# node must see it, and the checkout, under the same path.
# module load cuda/13.0
VENV="${VENV:-.venv}"

# Data and runs: what the configs call data/ and runs/ lies in these folders of a file system that every node shares;
# the scripts make data and runs links to them. Empty: plain folders of the checkout.
DATA_FOLDER="${DATA_FOLDER:-}" # such as /scratch/$USER/megachiar/data
RUNS_FOLDER="${RUNS_FOLDER:-}"

# Network: the interface that joins the nodes, for NCCL (GPUs) and gloo (CPUs). `ip addr` on a compute node lists them.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Crashes (a dead rank, a lost node) after which a job is still requeued, counted since its last orderly stop. Stops by
# the time limit, which save first, are requeued always.
MAX_RESTARTS="${MAX_RESTARTS:-5}"
