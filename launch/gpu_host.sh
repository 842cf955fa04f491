#!/usr/bin/env bash
# One host with several GPUs: one process for all of them, or one each, with XLA's flags for GPUs, and restarts.
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/hosts.sh"
processes=1 extra=cuda
flags=--xla_gpu_enable_latency_hiding_scheduler=true

_usage() {
  echo "usage: bash launch/gpu_host.sh [options] -- --config=… --workdir=…
  --processes=N     1: one process drives all GPUs; N: process I gets GPU I (1)
  --deterministic   only operations that give the same bits in every run (slower)
  --extra=cuda      JAX with CUDA; empty: as the environment is (cuda)
  --port=N          of the coordinator, with several processes (8476; one more after each restart)
$COMMON
example: bash launch/gpu_host.sh --dry-run -- --config=configs/pretrain.py:vggsound --workdir=runs/vggsound"
}

_option() {
  case $1 in
    --processes=*) processes=${1#*=} ;;
    --extra=*) extra=${1#*=} ;;
    --deterministic) flags="$flags --xla_gpu_deterministic_ops=true" ;;
    *) return 1 ;;
  esac
}

_start() {
  local own=(XLA_FLAGS="$flags ${XLA_FLAGS:-}" AV_MAE_PID="$logs/pid-$1") coordinator=
  if [ "$processes" -gt 1 ]; then
    own+=(CUDA_VISIBLE_DEVICES="$1")
    coordinator=localhost:$((port + attempt))
  fi
  _background "$1" env "${own[@]}" bash -c "cd $(_quote "$root") && exec $(_train "$1" "$processes" "$coordinator")"
}

_signal() {
  kill -"$1" "${pids[@]}" 2>/dev/null || true
}

_read_options "$@"
[[ $processes =~ ^[1-9][0-9]*$ ]] || _fail "--processes=$processes must be at least 1"
_attempts "$processes"
