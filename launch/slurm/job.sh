# shellcheck shell=bash disable=SC2154
# The body of a job, sourced by pretrain.sbatch and finetune.sbatch, which say what to run. It starts one task a GPU,
# hands signals on to them, and then goes by what the run directory says, not by srun's exit code: 0 when the run is
# finished; back into the queue when there is more to do; else its end's own code (docs/exit-codes.md).
: "${repository:?}" "${site:?}" "${config:?}" "${run:?}" "${script:?}"

say() { printf '%s job %s: %s\n' "$(date +%T)" "$SLURM_JOB_ID" "$*"; }

# The ranks save and end on SIGUSR1. srun hands it on; a SIGTERM to srun would kill them.
is_told='' srun_id=''
trap 'is_told=yes; [ -z "$srun_id" ] || kill -USR1 "$srun_id" 2>/dev/null' TERM USR1

# shellcheck source-path=SCRIPTDIR source=site.sh
if ! { source "$site" && prepare; }; then
    say "$site failed"
    exit 78
fi
mkdir -p "$run" || exit 73

# Tasks don't spin while they wait for one another; the cores are the loader's processes'.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} PYTHONUNBUFFERED=1
# Since 22.05 srun doesn't take it from the job.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# Slurm says this by itself since 23.02 (22.05 may hand on another job's); the ranks stop in time before it.
unset SLURM_JOB_END_TIME
if ends=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %e) && ends=$(date --date "${ends:-none}" +%s 2>/dev/null); then
    export SLURM_JOB_END_TIME=$ends
fi

count_lives() { if [ -f "$run/lives.jsonl" ]; then wc -l <"$run/lives.jsonl"; else echo 0; fi; }

# A rank that dies must not have the others killed before they have said why they end: their watchdogs end them within
# cluster.step_timeout_s. Every task sees all GPUs of its node and takes its own.
train() {
    srun --kill-on-bad-exit=0 --wait=360 --gpu-bind=none "${srun_options[@]}" \
        python "$script" --config "$config" --run-dir "$run" "${arguments[@]}" &
    srun_id=$!
    while kill -0 "$srun_id" 2>/dev/null; do wait "$srun_id"; done # a signal ends wait, not srun
    wait "$srun_id"
}

judge() {
    local status=(python -m swinv2_scale status "$run" --exit-code)
    if [ "${#srun_options[@]}" -gt 0 ]; then
        status=(srun --nodes=1 --ntasks=1 --overlap "${srun_options[@]}" "${status[@]}") # python may be in a container alone
    fi
    "${status[@]}"
}

lives_before=$(count_lives)
code=143
if [ -z "$is_told" ]; then
    train
    code=$?
    say "srun ended with $code"
fi
judge
verdict=$?

# A signal to the tasks alone, while they were being started, ends them before they can save anything.
case $code in 138 | 143) is_told=yes ;; esac
if [ "$verdict" -eq 85 ] && [ -z "$is_told" ] && [ "$(count_lives)" -eq "$lives_before" ]; then
    say "the ranks never opened the run directory; starting them again would end the same way"
    exit $((code ? code : 1))
fi
if [ "$verdict" -eq 85 ] && [ -e "$run/stop" ]; then
    say "$run/stop asked for this: not requeued; submit it again to go on"
elif [ "$verdict" -eq 85 ]; then
    # A job that was cancelled, or is out of time, is no longer RUNNING; requeueing would bring it back.
    if [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
        say "requeueing"
        scontrol requeue "$SLURM_JOB_ID" && sleep 60 # Slurm ends this script meanwhile
    fi
fi
exit "$verdict"
