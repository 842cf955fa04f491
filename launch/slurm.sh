#!/usr/bin/env bash
# Slurm: submits itself as a batch job, whose processes srun starts; restarts within the job, and requeues at its end.
# The code is used where it lies, in a folder that all nodes share.
set -eu
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/hosts.sh"
nodes=1 tasks=1 sbatch=() all=("$@")

_usage() {
  echo "usage: bash launch/slurm.sh [options] -- --config=… --workdir=…
  --nodes=N         nodes of the job (1)
  --tasks=N         processes on each node; JAX gives each the GPU of its local number (1)
  --extra=cuda|tpu  JAX with its accelerator libraries (cuda where --sbatch asks for GPUs)
  --sbatch=OPTION   goes to sbatch; may be given several times, e.g. --sbatch=--gpus-per-node=8 --sbatch=--time=24:00:00
$COMMON
Two minutes before the time limit the job saves its state and queues again. scancel saves it, within Slurm's KillWait,
and ends the job; a preempted job is queued again by Slurm itself.
example: bash launch/slurm.sh --nodes=4 --tasks=8 --sbatch=--gpus-per-node=8 --dry-run -- \\
           --config=configs/pretrain.py:base --workdir=/nfs/base"
}

_option() {
  case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --tasks=*) tasks=${1#*=} ;;
    --sbatch=*)
      sbatch+=("${1#*=}")
      [[ $1 != *gpu* ]] || extra=${extra:-cuda} ;;
    --extra=*) extra=${1#*=} ;;
    *) return 1 ;;
  esac
}

# One srun for all processes: its status is the highest of theirs. JAX finds the coordinator in Slurm's variables.
_start() {
  _background "$1" srun --nodes="$nodes" --ntasks-per-node="$tasks" --kill-on-bad-exit=0 --wait="$patience" \
    --output="$log/task-%t.log" bash -c "cd $(_quote "$root") && AV_MAE_PID=/dev/null exec $(_train 0 1)"
}

# To the processes of srun, not to srun, which would kill them. On scancel Slurm has sent it already: the job is gone then.
_signal() {
  scancel --signal="$1" "$SLURM_JOB_ID" 2>/dev/null || true
}

_time_is_up() {
  requeue=1
  _stop
}

_read_options "$@"
if [ -z "${SLURM_JOB_ID:-}" ]; then
  _run mkdir -p "$logs"
  _run sbatch --job-name=av_mae --nodes="$nodes" --ntasks-per-node="$tasks" --requeue --signal=B:USR1@120 \
    --open-mode=append --output="$logs/job-%j.log" "${sbatch[@]}" \
    --wrap="exec $(_quote bash "$root/launch/slurm.sh" --logs="$logs" "${all[@]/#--dry-run/--logs=$logs}")"
  [ -z "$dry_run" ] || _attempts 1
  exit
fi
status=0 requeue=
logs=$logs/start-${SLURM_RESTART_COUNT:-0}  # those of before the job was queued again stay
trap _time_is_up USR1
_attempts 1 || status=$?
if [ "$requeue" ] && [ "$status" = $RESTART ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
