# Sourced by the batch scripts of this folder: where the job runs, and how it ends. Nothing here needs editing: what a
# cluster needs (modules, a container, interfaces) goes into a hook file; see docs/slurm.md.

FPCN_LAUNCH=()  # in front of every command on a node, such as (apptainer exec --nv fpcn.sif)
if [ -z "${FPCN_HOOK:-}" ] && [ -f launch/slurm/hook.sh ]; then FPCN_HOOK=launch/slurm/hook.sh; fi
if [ -n "${FPCN_HOOK:-}" ]; then source "$FPCN_HOOK"; elif [ -d .venv ]; then source .venv/bin/activate; fi

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Two jobs on one node must not meet: a port of its own for each, above those of Ray's workers and below those that the
# system hands out by itself.
port=$((20000 + SLURM_JOB_ID % 10000))
gpus=${SLURM_GPUS_ON_NODE:-0}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
per_node=(--nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1)

# The output folder, where the arguments name one; else one for the job.
output=runs/$SLURM_JOB_NAME-$SLURM_JOB_ID
arguments=("$@")
for ((i = 0; i < $#; i++)); do
    case ${arguments[i]} in
        --output) output=${arguments[i + 1]:-$output} ;;
        --output=*) output=${arguments[i]#--output=} ;;
    esac
done
if [[ " $* " != *" --output"[\ =]* ]]; then arguments+=(--output "$output"); fi

log() { echo "$(date +%FT%T) job $SLURM_JOB_ID${SLURM_RESTART_COUNT:+, restart $SLURM_RESTART_COUNT}: $*"; }

# USR1, from #SBATCH --signal before the time limit or from the scheduler before it preempts: stop, and come back.
# Said again every few seconds, as a process that is only starting does not listen yet.
told=0
on_warning() {
    if [ $told = 0 ]; then
        told=1
        log "told to stop"
        { while stop_work; do sleep 5; done; } 2>/dev/null &
    fi
}
trap on_warning USR1

# Whether work that ended without an error has come to its end.
finished() { true; }

# What a job has reached; one that fails is queued again as long as that changes, so that no error goes on for ever.
progress() {
    find "$output" \( -name 'step-*.safetensors' -o -name outcome.json \) -printf '%p %T@\n' 2>/dev/null | sort | sha256sum
}

# Wait for process $1, however often a signal interrupts the waiting, and end the job as it ended; or queue it again.
finish() {
    local status=0 before
    before=$(progress)
    while kill -0 "$1" 2>/dev/null; do wait "$1"; status=$?; done
    if [ $told = 1 ] && { [ $status = 0 ] || [ $status = 75 ] || [ $status -gt 128 ]; }; then
        again "stopped"
    elif [ $status = 75 ] || { [ $status = 0 ] && ! finished; }; then
        again "stopped by a signal"
    elif [ $status != 0 ] && [ "$(progress)" != "$before" ]; then
        again "failed with status $status, but got further"
    fi
    log "ended with status $status"
    exit $status
}

again() {
    log "$1: queued again"
    scontrol requeue "$SLURM_JOB_ID" && sleep 60  # SLURM ends this script
}
