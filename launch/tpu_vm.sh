#!/usr/bin/env bash
# Google Cloud TPU VMs: one process on each host of a slice, which gcloud reaches. With --accelerator the slice is asked
# for as a queued resource, and asked for again where it was preempted; without, it is there already.
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/hosts.sh"
name= zone= accelerator= version= workers= spot=() extra=tpu

_usage() {
  echo "usage: bash launch/tpu_vm.sh --name=NAME --zone=ZONE [options] -- --config=… --workdir=…
  --name=NAME          of the TPU VM, and of its queued resource
  --zone=ZONE          e.g. us-west4-a
  --accelerator=TYPE   ask for a slice, e.g. v5litepod-16, v5p-128, v6e-256
  --version=VERSION    software of a slice that is asked for, e.g. v2-alpha-tpuv5-lite, v2-alpha-tpuv6e
  --spot               ask for one that may be preempted
  --workers=N          hosts of the slice (asked from gcloud)
  --folder=DIR         where the code goes on each host, from the home folder (av_mae)
$COMMON
--workdir must be a folder that all hosts share, e.g. a bucket mounted with gcsfuse.
example: bash launch/tpu_vm.sh --name=base --zone=us-west4-a --accelerator=v5litepod-16 \\
           --version=v2-alpha-tpuv5-lite --workers=4 --spot --dry-run -- \\
           --config=configs/pretrain.py:vggsound --workdir=/mnt/bucket/vggsound"
}

_option() {
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --workers=*) workers=${1#*=} ;;
    --spot) spot=(--spot) ;;
    *) return 1 ;;
  esac
}

_tpu() {
  local words=(gcloud compute tpus "$1" "$2" "$name" --zone="$zone")
  shift 2
  _run "${words[@]}" "$@"
}

_state() {
  gcloud compute tpus queued-resources describe "$name" --zone="$zone" --format='value(state.state)' 2>/dev/null || true
}

_ask() {
  _tpu queued-resources create --node-id="$name" --accelerator-type="$accelerator" --runtime-version="$version" \
    "${spot[@]}"
}

# A slice that is there, with the code on it.
_prepare() {
  if [ "$accelerator" ] && [ "$dry_run" ]; then
    _ask
  elif [ "$accelerator" ]; then
    _wait_for_slice
  elif [ "$attempt" -gt 0 ]; then
    return 0
  fi
  _pack
  _run gcloud compute tpus tpu-vm scp "$archive" "$name:av_mae.tar.gz" --zone="$zone" --worker=all
  _tpu tpu-vm ssh --worker=all --command="$(_unpack "\$HOME/av_mae.tar.gz")"
  rm -f "$archive"
}

_wait_for_slice() {
  local state said=
  while :; do
    state=$(_state)
    [ "$stopping" ] && exit $RESTART
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDED) _tpu queued-resources delete --force --quiet ;;
      '') _ask ;;
    esac
    [ "$state" = "$said" ] || echo "queued resource $name: ${state:-asked for}" >&2
    said=$state
    sleep 20
  done
}

_start() {
  _background "$1" gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$1" \
    --command="cd $(_quote "$folder") && exec $(_train "$1" "$workers" auto)"
}

_signal() {
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
    --command="cd $(_quote "$folder") && kill -$1 \$(cat .pid)" 2>/dev/null || true
  [ "$1" != KILL ] || kill "${pids[@]}" 2>/dev/null || true
}

_read_options "$@"
[ "$name" ] && [ "$zone" ] || _fail "which TPU VM? give --name=NAME and --zone=ZONE"
[ -z "$accelerator" ] || [ "$version" ] || _fail "--accelerator=$accelerator needs its software: give --version=VERSION"
if [ -z "$workers" ]; then
  [ -z "$dry_run$accelerator" ] || _fail "how many hosts has it? give --workers=N"
  workers=$(gcloud compute tpus tpu-vm describe "$name" --zone="$zone" --format='value(networkEndpoints.len())')
fi
_attempts "$workers"
