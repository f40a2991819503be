# Sourced by the batch scripts: start one rank per task, pass signals on, requeue what was not finished.
#
#   batch shell --USR1--> trap --kill--> srun --USR1--> every rank: saves at the end of its step, exits 75
#        |                                                                                            |
#        '--- wait <----------------------------- highest exit code of the tasks <--------------------'
#
#   0  finished               75  saved after a signal: requeue
#   2  something to mend      other  killed or crashed: requeue, at most MAX_RESTARTS times; resume from the last save

EXIT_USER_ERROR=2
EXIT_STOPPED=75

# Go to the checkout. sbatch runs a copy of the script from its spool folder, so only the submit folder tells.
enter_checkout() {
    cd "${SLURM_SUBMIT_DIR:-.}" || exit $EXIT_USER_ERROR
    if [ ! -f slurm/common.sh ] || [ ! -f megachiar/pretrain.py ]; then
        echo "error: $PWD is not the megachiar checkout: submit from its top folder (sbatch slurm/...)" >&2
        exit $EXIT_USER_ERROR
    fi
}

# Where the ranks meet: the first host of the job, a port that two jobs on one host do not share.
export_rendezvous() {
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
    export MASTER_ADDR MASTER_PORT
    if [ -z "$MASTER_ADDR" ]; then
        echo "error: no host in SLURM_JOB_NODELIST '$SLURM_JOB_NODELIST'" >&2
        exit $EXIT_USER_ERROR
    fi
}

# run_step COMMAND...: run COMMAND as one task per rank; its exit code is the highest of the tasks, but 2
# where any task had a user error.
run_step() {
    local step_pid code=0 signalled=0
    export USER_ERROR_MARK="$PWD/.slurm-user-error-$SLURM_JOB_ID"
    rm -f "$USER_ERROR_MARK"
    # srun does not inherit --cpus-per-task; the first rank that fails ends the others.
    srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 bash slurm/task.sh "$@" &
    step_pid=$!
    # `--signal=B:USR1` reaches this shell alone: pass it on. A signal ends `wait`, hence the loop.
    trap 'signalled=1; kill -USR1 $step_pid 2>/dev/null' USR1 TERM
    while :; do
        wait "$step_pid" && code=0 || code=$?
        kill -0 "$step_pid" 2>/dev/null || break
    done
    trap '' USR1 TERM
    # The exit code of the last `wait` may be that of the signal: ask once more for the step's own.
    if [ $signalled = 1 ] && [ $code -gt 128 ]; then
        wait "$step_pid" && code=0 || code=$?
    fi
    if [ -e "$USER_ERROR_MARK" ]; then
        rm -f "$USER_ERROR_MARK"
        code=$EXIT_USER_ERROR
    fi
    return $code
}

# finish CODE: end the job as CODE asks for, see the table at the top.
finish() {
    local code=$1 restarts=${SLURM_RESTART_COUNT:-0}
    case $code in
        0) echo "finished" ;;
        "$EXIT_USER_ERROR") echo "not requeued: see the error above" >&2 ;;
        "$EXIT_STOPPED")
            echo "saved after a signal; requeued"
            scontrol requeue "$SLURM_JOB_ID"
            ;;
        *)
            if [ "$restarts" -lt "$MAX_RESTARTS" ]; then
                echo "a rank ended with exit code $code; requeued (restart $((restarts + 1)) of $MAX_RESTARTS)" >&2
                scontrol requeue "$SLURM_JOB_ID"
            else
                echo "a rank ended with exit code $code after $restarts restarts: giving up" >&2
            fi
            ;;
    esac
    exit "$code"
}

# pretrain CONFIG ARGUMENT...: train CONFIG on every task of this job.
pretrain() {
    local config=$1 code=0
    shift
    enter_checkout
    source slurm/env.sh
    export_rendezvous
    echo "job $SLURM_JOB_ID: $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST, rendezvous $MASTER_ADDR:$MASTER_PORT"
    run_step python -u -m megachiar.pretrain --config "$config" "$@" || code=$?
    finish "$code"
}
