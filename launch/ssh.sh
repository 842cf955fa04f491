#!/usr/bin/env bash
# One process on each of a list of hosts that ssh reaches: stages the code, starts, restarts, gathers the output.
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/hosts.sh"
hosts=()

_usage() {
  echo "usage: bash launch/ssh.sh --hosts=HOST,HOST,… [options] -- --config=… --workdir=…
  --hosts=A,B,…     as ssh knows them; process 0 runs on the first
  --extra=cuda|tpu  JAX with its accelerator libraries
  --port=N          of the coordinator on the first host (8476; one more after each restart)
  --folder=DIR      where the code goes on each host, from the home folder (av_mae)
$COMMON
--workdir must be a folder that all hosts share.
example: bash launch/ssh.sh --hosts=gpu1,gpu2 --extra=cuda --dry-run -- \\
           --config=configs/pretrain.py:base --workdir=/nfs/base"
}

_option() {
  case $1 in
    --hosts=*) IFS=, read -ra hosts <<< "${1#*=}" ;;
    --extra=*) extra=${1#*=} ;;
    *) return 1 ;;
  esac
}

_start() {
  local coordinator=${hosts[0]#*@}:$((port + attempt))
  _background "$1" ssh -o BatchMode=yes -o ServerAliveInterval=15 "${hosts[$1]}" \
    "cd $(_quote "$folder") && AV_MAE_PID=.pid-$1 exec $(_train "$1" ${#hosts[@]} "$coordinator")"
}

_signal() {
  local i
  for i in "${!hosts[@]}"; do
    ssh -o BatchMode=yes -o ConnectTimeout=10 "${hosts[i]}" \
      "cd $(_quote "$folder") && kill -$1 \$(cat .pid-$i)" 2>/dev/null || true
  done
  [ "$1" != KILL ] || kill "${pids[@]}" 2>/dev/null || true  # connections to hosts that do not answer
}

_stage() {
  local host
  _pack
  for host in "${hosts[@]}"; do
    _run scp -q -o BatchMode=yes "$archive" "$host:av_mae.tar.gz"
    _run ssh -o BatchMode=yes "$host" "mkdir -p $(_quote "$folder") && tar -xzf av_mae.tar.gz -C $(_quote "$folder")"
  done
  rm -f "$archive"
}

_read_options "$@"
[ ${#hosts[@]} -gt 0 ] || _fail "no hosts: give --hosts=HOST,HOST"
_stage
_attempts ${#hosts[@]}
