# shellcheck shell=bash
# What the scripts of this folder share. They source it from the folder they were submitted in: Slurm runs a copy of the
# script itself, out of its spool. The settings of a site come from site.sh (see site.example.sh).
set -euo pipefail

ATTEMPT=$((${SLURM_RESTART_COUNT:-0} + 1)) # Slurm does not set it in the first one
# Notes for the next attempt, which may run on another node.
JOB=$(realpath -m "${OAT_JOBS:-slurm-jobs}")/${SLURM_JOB_ID:?start this with sbatch}
# Names of their own for every attempt: a rank that outlives one cannot speak for the next.
STOP_FILE=$JOB/stop-$ATTEMPT OUTCOME_FILE=$JOB/outcome-$ATTEMPT

say() { printf '%(%F %T)T attempt %d: %s\n' -1 "$ATTEMPT" "$*"; }

usage() { # TEXT
    echo "usage: $1" >&2
    rm -rf "$JOB"
    exit 2
}

# The batch script alone hears the signal (--signal=B:USR1), the ranks look for the file: launchers would die of it.
asked_to_stop() { # SIGNAL
    say "asked to stop (SIG$1)"
    touch "$STOP_FILE" || : # it says why not; the ranks still run
}

read_site() {
    local site=${OAT_SITE:-launch/slurm/site.sh}
    [[ -n ${OAT_SITE:-} || -e $site ]] || return 0
    set +eu # what sites load (modules, conda) is not written for these
    # shellcheck source=launch/slurm/site.example.sh
    source "$site"
    set -eu
}

rendezvous() { # where the ranks meet: on the first node
    local nodes
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR=${nodes%%$'\n'*}
    # Another port for every job and attempt: a rank that outlives one still holds its own.
    export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 16 + ATTEMPT % 16) % 12000))
    getent ahosts "$MASTER_ADDR" >/dev/null || # PyTorch would wait for minutes
        say "warning: the name of the first node, $MASTER_ADDR, does not resolve: the ranks will not meet"
}

launch() { # COMMAND ARGUMENT...: `oat-dist COMMAND` on every rank; waits, through signals, until all have ended
    local nodes=${SLURM_JOB_NUM_NODES} ranks=${SLURM_NTASKS_PER_NODE:-1} cores=${SLURM_CPUS_PER_TASK:-1} task
    local launcher=${LAUNCHER:-srun} flags=(--export=ALL) # also where the site exports nothing to jobs
    flags+=(--kill-on-bad-exit=1) # a rank that died ends the others, which would wait for it
    rendezvous
    export OMP_NUM_THREADS=$cores # else every rank starts a thread for each core of the machine
    case $launcher in
    srun) # a task is a rank; the cores again, since srun forgets them as of Slurm 22.05
        export WORLD_SIZE=$((nodes * ranks)) LOCAL_WORLD_SIZE=$ranks
        flags+=(--ntasks="$WORLD_SIZE" --ntasks-per-node="$ranks" --cpus-per-task="$cores")
        # shellcheck disable=SC2016 # expanded in the task; exec, so that signals reach the rank
        task='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec "${PYTHON:-python}" -u -m oat_dist.cli "$@"'
        ;;
    accelerate) # a task is a launcher, of all ranks of its node
        flags+=(--ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="$((ranks * cores))")
        export RANKS=$((nodes * ranks)) ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-configs/accelerate/nodes.yaml}
        ((RANKS > 1)) || ACCELERATE_CONFIG=configs/accelerate/one.yaml # accelerate refuses the other for one process
        # For torchrun, which is inside accelerate: should a signal reach it after all, pass it on instead of dying of
        # it, and leave the ranks the time to save (seconds).
        export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 PET_SHUTDOWN_TIMEOUT=600
        # shellcheck disable=SC2016 # expanded in the task
        task='exec accelerate launch --config_file "$ACCELERATE_CONFIG" --num_machines "$SLURM_JOB_NUM_NODES" \
            --machine_rank "$SLURM_NODEID" --num_processes "$RANKS" --main_process_ip "$MASTER_ADDR" \
            --main_process_port "$MASTER_PORT" -m oat_dist.cli "$@"'
        ;;
    *) usage "LAUNCHER=srun or LAUNCHER=accelerate, not $launcher" ;;
    esac
    say "$1 on $nodes node(s) x $ranks rank(s) x $cores core(s) by $launcher, meeting at $MASTER_ADDR:$MASTER_PORT"
    srun "${flags[@]}" bash -c "$task" rank "$@" &
    until wait $!; STATUS=$?; ! kill -0 $! 2>/dev/null; do :; done # a trapped signal ends `wait`, not srun
}

# The packed set $DATA, once a node on its own disk $OAT_SCRATCH, complete or absent; prints what to train on.
stage() {
    local digest copy
    # shellcheck disable=SC2016 # expanded in the task
    copy='mkdir -p "$OAT_SCRATCH"
        exec 9>"$STAGED.lock"
        flock 9 # another job of this node may be at it
        [[ ! -d $STAGED ]] || exit 0
        rm -rf "$STAGED.part"
        cp -RL "$DATA" "$STAGED.part"
        "${PYTHON:-python}" -m oat_dist.cli verify --no-decode "$STAGED.part" >/dev/null
        mv "$STAGED.part" "$STAGED"'
    if digest=$(cat "$DATA"/*/manifest.json | sha256sum) &&
        export DATA OAT_SCRATCH STAGED=$OAT_SCRATCH/${digest:0:16} &&
        srun --export=ALL --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -euc "$copy" >&2; then
        echo "$STAGED"
    else
        say "warning: $DATA could not be copied to $OAT_SCRATCH; it is read where it lies" >&2
        echo "$DATA"
    fi
}

settings() { # sets OURS, the key=value that follow from the allocation and the site; yours come after and win
    # The same number in every attempt, or sums would differ in the last bit.
    OURS=("engine.threads=${SLURM_CPUS_PER_TASK:-1}")
    [[ -n ${DATA:-} ]] || return 0
    [[ -z ${OAT_SCRATCH:-} || ! -d $DATA ]] || DATA=$(stage) # shards behind URLs are cached as they are needed
    OURS+=("data.path=$DATA")
}

train() { # CONFIG key=value...
    settings
    # A rank of the last attempt may live on, on a node that Slurm has lost.
    ((ATTEMPT == 1)) || OURS+=(job.take_over=true)
    launch train "$1" "${OURS[@]}" "${@:2}" "job.stop_file=$STOP_FILE" "job.outcome_file=$OUTCOME_FILE"
    decide
}

decide() { # what comes next: the end, or the same job again
    local state=none step=-1 total='?' reached=-1 failures=0 progress=false what job=$SLURM_JOB_ID slurm
    [[ ! -e $OUTCOME_FILE ]] || read -r state step total <"$OUTCOME_FILE"
    [[ ! -e $JOB/progress ]] || read -r reached failures <"$JOB/progress" # of the attempts before
    if ((step > reached)); then progress=true reached=$step failures=0; fi
    what="$state at step $step of $total"
    # The plain number of an array would be all of its tasks.
    [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    slurm=$(scontrol -o show job "$job") || : # it says why not
    if [[ $slurm =~ \ Restarts=([0-9]+)\  ]] && ((BASH_REMATCH[1] >= ATTEMPT)); then
        say "$what; requeued by Slurm" # the notes are the next attempt's, which may have begun
        exit 0
    fi
    case $state in
    finished) end 0 "$what" ;;
    refused) end 1 "refused, see the line that begins with error: (trying again would not help)" ;;
    stopped) $progress || ((++failures)) ;; # else a job that is always stopped before it gets anywhere never ends
    none) what="failed before any rank could say why, srun's status $STATUS" && ((++failures)) ;;
    *) what="failed after step $step of $total, srun's status $STATUS" && ((++failures)) ;;
    esac
    if [[ $slurm =~ JobState=(COMPLETING|CANCELLED) && $slurm != *Reason=TimeLimit* ]]; then
        end 1 "$what; cancelled: the same command resumes there" # requeueing would revive it
    elif ((failures >= ${MAX_FAILURES:-3})); then
        end 1 "$what; given up after $failures attempt(s) in a row without progress"
    fi
    echo "$reached $failures" >"$JOB/progress.new"
    mv "$JOB/progress.new" "$JOB/progress"
    say "$what; requeued"
    scontrol requeue "$job" || end 1 "Slurm does not requeue this job: submit it again, it resumes there"
    exit 0 # if Slurm does not end this script before
}

end() { # STATUS TEXT
    trap '' USR1 TERM # too late: there is nothing left to stop
    say "$2"
    rm -rf "$JOB"
    exit "$1"
}

((ATTEMPT > 1)) || rm -rf "$JOB" # of a job that had this number before
mkdir -p "$JOB"
trap 'asked_to_stop USR1' USR1
trap 'asked_to_stop TERM' TERM
read_site
