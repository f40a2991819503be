#!/bin/bash
# Turn many files into one dataset: an array of tasks makes a shard each, a dependent job merges them.
#
#   bash slurm/preprocess.sh submit OUTPUT_PREFIX TOKENIZER SHARDS FILE... [-- FLAG OF tools/preprocess_data.py ...]
#   bash slurm/preprocess.sh submit data/web/train gpt2 64 raw/web-*.jsonl.zst -- --on-error skip
#
# Shard number i takes the files i, i + SHARDS, i + 2 * SHARDS, ... in the order given. A shard that is whole already is
# skipped, so that a requeued or resubmitted array does only what is missing. The shards stay until the merge is whole.

#SBATCH --job-name=megachiar-preprocess
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.out

set -euo pipefail

shard_prefix() { printf '%s.shards/%05d' "$1" "$2"; }

submit() {
    local output=$1 tokenizer=$2 shards=$3 array
    shift 3
    if ! [[ $shards =~ ^[1-9][0-9]*$ ]]; then
        echo "error: SHARDS is '$shards', not a number of at least 1" >&2
        exit 2
    fi
    local files=0
    for argument in "$@"; do
        [ "$argument" = -- ] && break
        [ -f "$argument" ] || { echo "error: $argument: no such file" >&2; exit 2; }
        files=$((files + 1))
    done
    if [ "$files" -lt "$shards" ]; then
        echo "error: $files files for $shards shards: use at most as many shards as files" >&2
        exit 2
    fi
    mkdir -p "$output.shards"
    array=$(sbatch --parsable --array="0-$((shards - 1))" slurm/preprocess.sh shard "$output" "$tokenizer" "$shards" "$@")
    sbatch --dependency="afterok:${array%%;*}" --kill-on-invalid-dep=yes --job-name=megachiar-merge \
        slurm/preprocess.sh merge "$output" "$shards"
}

shard() {
    local output=$1 tokenizer=$2 shards=$3 number=$SLURM_ARRAY_TASK_ID prefix
    shift 3
    prefix=$(shard_prefix "$output" "$number")
    if [ -f "$prefix.json" ] && python tools/inspect_dataset.py "$prefix" >/dev/null 2>&1; then
        echo "$prefix is whole: skipped"
        return
    fi
    local files=() index=0
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        [ $((index % shards)) = "$number" ] && files+=("$1")
        index=$((index + 1))
        shift
    done
    [ $# -gt 0 ] && shift # the --
    python tools/preprocess_data.py --input "${files[@]}" --tokenizer "$tokenizer" --append-eod --overwrite \
        --workers "${SLURM_CPUS_PER_TASK:-1}" --output-prefix "$prefix" "$@"
}

merge() {
    local output=$1 shards=$2 prefixes=() number
    for ((number = 0; number < shards; number++)); do
        prefixes+=("$(shard_prefix "$output" "$number")")
    done
    python tools/merge_datasets.py "${prefixes[@]}" --output "$output"
    rm -r "$output.shards"
}

source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh" || exit 2
enter_checkout
if [ "${1:-}" != submit ]; then
    source slurm/env.sh
fi
case "${1:-}" in
    submit | shard | merge) "$@" ;;
    *)
        echo "usage: bash slurm/preprocess.sh submit OUTPUT_PREFIX TOKENIZER SHARDS FILE... [-- FLAG ...]" >&2
        exit 2
        ;;
esac
