# Sourced by the batch scripts: start one rank per task, pass signals on, requeue what was not finished.
#
#   batch shell --USR1--> trap --kill--> srun --USR1--> every rank: saves at the end of its step, exits 75
#        |                                                                                            |
#        '--- wait <----------------------------- highest exit code of the tasks <--------------------'
#
#   0  finished               75  saved after a signal: requeue, unless Slurm is ending the job itself (SIGTERM)
#   2  something to mend      other  killed or crashed: requeue while crashes <= MAX_RESTARTS, from the last save

EXIT_USER_ERROR=2
EXIT_STOPPED=75

fail() {
    echo "error: $1" >&2
    exit $EXIT_USER_ERROR
}

# Source env.sh and make its folders.
load_settings() {
    source slurm/env.sh
    link_folder data "$DATA_FOLDER"
    link_folder runs "$RUNS_FOLDER"
}

# Load the settings and activate their virtual environment.
load_environment() {
    load_settings
    [ -f "$VENV/bin/activate" ] || fail "no virtual environment in '$VENV' on $(hostname): set VENV in slurm/env.sh"
    source "$VENV/bin/activate"
}

# link_folder NAME TARGET: make NAME in the checkout a link to the folder TARGET, unless that is empty.
link_folder() {
    local name=$1 target=$2
    [ -n "$target" ] || return 0
    mkdir -p "$target" || fail "cannot make the folder '$target' of slurm/env.sh"
    if [ -e "$name" ] && [ ! "$name" -ef "$target" ] && [ ! -L "$name" ]; then
        fail "$PWD/$name is a folder, but slurm/env.sh says $target: move what it holds there, then remove it"
    fi
    [ "$name" -ef "$target" ] || ln -sfn "$(realpath "$target")" "$name"
}

# Where the ranks meet: the first host of the job, a port that no two jobs on one host share and no system hands out.
export_rendezvous() {
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    [ -n "$MASTER_ADDR" ] || fail "no host in SLURM_JOB_NODELIST '$SLURM_JOB_NODELIST'"
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
    export MASTER_ADDR MASTER_PORT
}

# run_step COMMAND...: run COMMAND as one task per rank. Returns the highest exit code of the tasks, but 2 where any
# task had a user error. Sets `ending` to 1 if Slurm said that it ends the job (cancelled, preempted, out of time).
run_step() {
    local step_pid='' code=0 signalled
    ending=0
    export USER_ERROR_MARK="$PWD/.slurm-$SLURM_JOB_ID.user-error"
    rm -f "$USER_ERROR_MARK"
    # `--signal=B:USR1` reaches this shell alone: pass it on.
    trap 'signalled=1; pass_on_signal $step_pid' USR1
    trap 'signalled=1; ending=1; pass_on_signal $step_pid' TERM
    # srun does not inherit --cpus-per-task; the first rank that fails ends the others. Ranks of a lost node never say
    # that they ended: without a limit (seconds since the first rank's end) srun may wait until the job's time is up.
    srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 --wait="${SLURM_WAIT:-600}" \
        bash slurm/task.sh "$@" &
    step_pid=$!
    while :; do # a signal ends `wait` early, with a code of its own
        signalled=0 code=0
        wait "$step_pid" || code=$?
        [ $signalled = 1 ] || break
    done
    trap '' USR1
    ls -a "$PWD" >/dev/null # a network file system may still show this node an older listing
    if [ -e "$USER_ERROR_MARK" ]; then
        rm -f "$USER_ERROR_MARK"
        code=$EXIT_USER_ERROR
    fi
    return $code
}

pass_on_signal() {
    [ $# = 0 ] || kill -USR1 "$1" 2>/dev/null
}

# finish CODE: end the job as CODE asks for, see the table at the top.
finish() {
    local code=$1 crashes_file=".slurm-$SLURM_JOB_ID.crashes" crashes=0
    # Counted here: SLURM_RESTART_COUNT counts orderly stops too. A job id that comes back starts anew.
    if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -f "$crashes_file" ]; then
        crashes=$(<"$crashes_file")
    fi
    case $code in
        0 | "$EXIT_USER_ERROR" | "$EXIT_STOPPED") rm -f "$crashes_file" ;;
        *) crashes=$((crashes + 1)) ;;
    esac
    if [ "$code" = 0 ]; then
        echo "finished"
    elif [ "$code" = "$EXIT_USER_ERROR" ]; then
        echo "not requeued: see the error above" >&2
    elif slurm_ends_the_job; then
        echo "ended by Slurm (cancelled, preempted or out of time) with exit code $code: not requeued from here" >&2
    elif [ "$code" = "$EXIT_STOPPED" ]; then
        requeue "saved after a signal"
    elif [ "$crashes" -gt "$MAX_RESTARTS" ]; then
        rm -f "$crashes_file"
        echo "a rank ended with exit code $code, crash $crashes since the last orderly stop: giving up" >&2
    else
        echo "$crashes" >"$crashes_file"
        requeue "a rank ended with exit code $code, crash $crashes of at most $MAX_RESTARTS"
    fi
    exit "$code"
}

# A job that is cancelled as it starts ends before there is a trap for SIGTERM, and `scontrol requeue` would revive it.
# After a lost node Slurm requeues the job itself. Neither is RUNNING; if squeue knows nothing, the job is not ending.
slurm_ends_the_job() {
    local state
    [ "$ending" = 1 ] && return
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
    [ -n "$state" ] && [ "$state" != RUNNING ]
}

requeue() {
    echo "$1; requeued"
    scontrol requeue "$SLURM_JOB_ID" && return
    # A node may have been lost since, and Slurm have requeued the job itself.
    [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = PENDING ] ||
        echo "error: Slurm did not requeue job $SLURM_JOB_ID: submit it again, it resumes from the last save" >&2
}

# pretrain CONFIG ARGUMENT...: train CONFIG on every task of this job.
pretrain() {
    local config=$1 code=0 ending=0
    shift
    load_environment
    export_rendezvous
    # Cores of one rank: torch would share out again what Slurm has shared out already.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
    echo "job $SLURM_JOB_ID: $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST, rendezvous $MASTER_ADDR:$MASTER_PORT"
    run_step python -u -m megachiar.pretrain --config "$config" "$@" || code=$?
    finish "$code"
}
