#!/bin/bash
# Turn many files into one dataset: an array of jobs makes a shard each, a dependent job merges the shards.
#
#   bash slurm/preprocess.sh OUTPUT_PREFIX TOKENIZER SHARDS FILE... [-- FLAG of tools/preprocess_data.py ...]
#   bash slurm/preprocess.sh data/web gpt2 64 raw/web-*.jsonl.zst -- --on-error skip --split train=99,valid=1
#
# From the top folder of the checkout, after editing slurm/env.sh. Options for both sbatch calls go into SBATCH_*
# variables (SBATCH_PARTITION=cpu bash slurm/preprocess.sh ...). Each shard takes its share of the files in their order,
# so that the dataset is byte for byte what one process would write. The shards lie in OUTPUT_PREFIX.shards until the
# merge is whole. After a failure run the same command again: what is done already is not done again; after a
# success it says so and queues nothing.

#SBATCH --job-name=megachiar-preprocess
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A-%a.out

USAGE="usage: bash slurm/preprocess.sh OUTPUT_PREFIX TOKENIZER SHARDS FILE... [-- FLAG ...]"

# submit OUTPUT TOKENIZER SHARDS FILE... [-- FLAG...]: check the call, write the plan, queue the array and the merge.
submit() {
    [ $# -ge 4 ] || fail "$USAGE"
    local output=$1 tokenizer=$2 shards=$3 files=() flags=() parts=()
    shift 3
    load_settings # before a folder is made under data/, which may have to become a link
    split_at_dashes "$@"
    check_call
    if merged_before; then # by this call? the tool tells
        load_environment
        preprocess --merge-shards "$shards"
        return
    fi
    mkdir -p "$output.shards" || exit $EXIT_USER_ERROR
    write_plan "$output.shards/plan"
    local array merge jobs="$output.shards/jobs"
    if [ -f "$jobs" ] && [ -n "$(squeue --noheader --jobs="$(<"$jobs")" 2>/dev/null)" ]; then
        fail "jobs $(<"$jobs") still work on $output: wait for them, or scancel them first"
    fi
    array=$(sbatch --parsable --array="0-$((shards - 1))" slurm/preprocess.sh --shard "$output.shards") || exit 1
    merge=$(sbatch --parsable --dependency="afterok:${array%%;*}" --kill-on-invalid-dep=yes \
        --job-name=megachiar-merge --output=slurm-%x-%j.out slurm/preprocess.sh --merge "$output.shards") || {
        scancel "${array%%;*}" # or the next call would start a second array beside it
        exit 1
    }
    echo "${array%%;*},${merge%%;*}" >"$jobs"
    echo "job array ${array%%;*} makes $shards shards of ${#files[@]} files; job ${merge%%;*} merges them"
}

# Sort "$@" into files, flags, and the parts that --split names (one nameless part without).
split_at_dashes() {
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        files+=("$1")
        shift
    done
    flags=("${@:2}")
    local value='' i
    for ((i = 0; i < ${#flags[@]}; i++)); do
        case ${flags[i]} in
            --split) value=${flags[i + 1]:-} ;;
            --split=*) value=${flags[i]#*=} ;;
        esac
    done
    value=${value//[[:space:]]/} # which the tool ignores too
    parts=("")
    if [ -n "$value" ]; then
        IFS=, read -r -a parts <<<"$value"
        parts=("${parts[@]%%=*}")
        parts=("${parts[@]/#/_}")
    fi
}

check_call() {
    local file part suffix
    [[ $shards =~ ^[1-9][0-9]{0,4}$ ]] || fail "SHARDS is '$shards', not a number from 1 to 99999"
    for file in "${files[@]}"; do
        [ -f "$file" ] || fail "$file: no such file"
    done
    [ "${#files[@]}" -ge "$shards" ] ||
        fail "${#files[@]} files for $shards shards: use at most as many shards as files"
    [ -e "$tokenizer" ] || [[ $tokenizer = hf:* ]] || fail "$tokenizer: no such tokenizer"
    for part in "${parts[@]}"; do
        for suffix in bin idx json; do
            file="$output$part.$suffix"
            [ ! "$file" -ef "$tokenizer" ] || fail "$file is the tokenizer: choose another OUTPUT_PREFIX"
            [ ! -e "$file" ] || [ -e "$output.shards/finishing" ] || [[ " ${flags[*]} " = *" --overwrite "* ]] ||
                merged_before ||
                fail "$file exists already: choose another OUTPUT_PREFIX, or add -- --overwrite"
        done
    done
}

# Whether every part is whole, no shard is left, and nothing asks to replace them.
merged_before() {
    local part suffix
    for part in "${parts[@]}"; do
        for suffix in bin idx json; do
            [ -e "$output$part.$suffix" ] || return
        done
    done
    [ ! -e "$output.shards" ] && [[ " ${flags[*]} " != *" --overwrite "* ]]
}

# What the jobs read: the call as bash variables. Shards of another call must not end in this dataset.
write_plan() {
    declare -p output tokenizer shards files flags parts >"$1.new" || exit $EXIT_USER_ERROR
    if [ -f "$1" ] && ! cmp -s "$1" "$1.new"; then
        rm "$1.new"
        fail "${1%/plan} holds shards of another call (see $1): remove that folder, or choose another OUTPUT_PREFIX"
    fi
    mv "$1.new" "$1"
}

# shard FOLDER: make shard number SLURM_ARRAY_TASK_ID of the plan in FOLDER, or what is missing of it.
shard() {
    local output tokenizer shards files flags parts
    source "$1/plan" || return
    preprocess --shard "$SLURM_ARRAY_TASK_ID/$shards" --workers "${SLURM_CPUS_PER_TASK:-1}"
}

# merge FOLDER: join the shards in FOLDER to the dataset of its plan, then remove them.
merge() {
    local output tokenizer shards files flags parts
    source "$1/plan" || return # without it there is no telling what to merge
    preprocess --merge-shards "$shards"
}

# preprocess FLAG...: the call of the plan, of which each job does the part that FLAG says.
preprocess() {
    python tools/preprocess_data.py --input "${files[@]}" --tokenizer "$tokenizer" --append-eod \
        --output-prefix "$output" "${flags[@]}" "$@"
}

# sbatch runs a copy of this file from its spool folder: only the folder of submission leads to the checkout. A call
# inside a salloc is in the checkout already, wherever that was submitted.
[ -f megachiar/pretrain.py ] || cd "${SLURM_SUBMIT_DIR:-.}"
[ -f megachiar/pretrain.py ] && source slurm/common.sh || {
    echo "error: $PWD is not the megachiar checkout: cd there, then bash slurm/..." >&2
    exit 2
}
case "${1:-}" in
    --shard | --merge)
        load_environment
        "${1#--}" "$2"
        ;;
    *) submit "$@" ;;
esac
