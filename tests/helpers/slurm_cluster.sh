#!/usr/bin/env bash
# The inside of slurm_cluster.py, as process 1 of namespaces of its own: a network, munged, slurmctld and the nodes.
#
#   slurm_cluster.sh cluster FOLDER NAME=ADDRESS...     slurm_cluster.sh node FOLDER NAME ADDRESS
#
#   host "control" 10.99.0.1                  munged, slurmctld; slurm_cluster.py enters here to call sbatch and others
#        |  bridge br0
#        +-- host "n1" 10.99.0.11  slurmd     each node has network, host name, mounts and processes of its own:
#        '-- host "n2" 10.99.0.12  slurmd     when its process 1 is killed, all of it is gone, as after a power loss
set -eu
what=$1 folder=$2
shift 2
cd "$folder"

cluster() {
    hostname control
    mount --bind hosts /etc/hosts
    ip link set lo up
    ip link add br0 type bridge
    ip link set br0 up
    ip addr add 10.99.0.1/24 dev br0
    munged --foreground --key-file=munge.key --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" &
    slurmctld -D &
    for node; do
        keep_node "${node%=*}" "${node#*=}" &
    done
    wait # also for orphans, which come to process 1
}

# keep_node NAME ADDRESS: start the node, and again whenever it ends. While the file NAME.off exists it stays off.
keep_node() {
    local node inside
    while :; do
        while [ -e "$1.off" ]; do sleep 0.1; done
        ip link del "v$1" 2>/dev/null || true
        unshare --mount --uts --pid --net --fork --kill-child --mount-proc bash "$0" node "$folder" "$1" "$2" &
        node=$!
        until inside=$(pgrep --parent "$node"); do sleep 0.05; done
        ip link add "v$1" type veth peer name e0 netns "$inside"
        ip link set "v$1" master br0 up
        wait "$node" || true
    done
}

node() {
    hostname "$1"
    until ip link show e0 >/dev/null 2>&1; do sleep 0.05; done
    ip link set lo up
    ip addr add "$2/24" dev e0
    ip link set e0 up
    while :; do
        slurmd -D || true # it ends when slurmctld does not answer yet
        sleep 1
    done &
    wait
}

"$what" "$@"
