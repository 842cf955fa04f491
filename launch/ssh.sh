#!/usr/bin/env bash
# One process on each of a list of hosts that ssh reaches: stages the code, starts, restarts, gathers the output.
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/hosts.sh"
hosts=() ssh=(ssh -o BatchMode=yes) address=

_usage() {
  echo "usage: bash launch/ssh.sh --hosts=HOST,HOST,… [options] -- --config=… --workdir=…
  --hosts=A,B,…     as ssh knows them: names, user@name, aliases of its configuration, with their ports and jump hosts;
                    process 0 runs on the first
  --address=NAME    of the first host, as all hosts reach it (the HostName that ssh has for it)
  --port=N          of the coordinator on the first host (8476; one more after each restart)
  --ssh_config=FILE   of ssh, instead of ~/.ssh/config
  --extra=cuda|tpu  JAX with its accelerator libraries
  --folder=DIR      where the code goes on each host, from the home folder (av_mae)
$COMMON
--workdir must be a folder that all hosts share.
example: bash launch/ssh.sh --hosts=gpu1,gpu2 --extra=cuda --dry-run -- \\
           --config=configs/pretrain.py:base --workdir=/nfs/base"
}

_option() {
  case $1 in
    --hosts=*) IFS=, read -ra hosts <<< "${1#*=}" ;;
    --address=*) address=${1#*=} ;;
    --ssh_config=*)
      [ -r "${1#*=}" ] || _fail "$1 cannot be read: name a file of ssh's configuration"
      ssh+=(-F "${1#*=}") ;;
    --extra=*) extra=${1#*=} ;;
    *) return 1 ;;
  esac
}

# The name or number behind what ssh calls a host.
_host_name() {
  local settings
  settings=$("${ssh[@]}" -T -G "$1") || _fail "ssh cannot take --hosts=…$1… (see above)"
  sed -n 's/^hostname //p' <<< "$settings"
}

# Sets address: where all hosts reach the first one.
_find_address() {
  if [ -z "$address" ] && [ "$dry_run" ] && ! command -v ssh > /dev/null; then
    address=${hosts[0]#*@}
  fi
  address=${address:-$(_host_name "${hosts[0]}")}
}

# Refuses to start where a host cannot be reached, or does not know the coordinator's name (127: it has no getent).
_check_hosts() {
  local host said status name
  name=$(_quote "$address")
  for host in "${hosts[@]}"; do
    status=0
    said=$(_run "${ssh[@]}" -o ConnectTimeout=20 "$host" "getent ahosts $name > /dev/null" 2>&1 < /dev/null) || status=$?
    [ -z "$dry_run" ] || echo "$said"
    [ $status != 255 ] || _fail "ssh does not reach $host: $(tr -d '\r' <<< "${said##*$'\n'}")"
    [ $status = 0 ] || [ $status = 127 ] ||
      _fail "$host does not know $address, the name of ${hosts[0]}: give --address=NAME that all hosts know"
  done
}

_is_own() {
  [[ $1 =~ ^(localhost|127\..*|::1)$ ]]
}

# Refuses an address that means another host on every host.
_check_address() {
  local host name
  _is_own "$address" || return 0
  for host in "${hosts[@]}"; do
    name=$(_host_name "$host")
    _is_own "$name" ||
      _fail "$host would look for ${hosts[0]} at $address, which is $host itself: give --address=NAME that all hosts know"
  done
}

_start() {
  local at=$address
  [[ $at != *:* ]] || at=[$at]  # of IPv6
  _background "$1" "${ssh[@]}" -o ServerAliveInterval=15 "${hosts[$1]}" \
    "cd $(_quote "$folder") && AV_MAE_PID=.pid-$1 exec $(_train "$1" ${#hosts[@]} "$at:$((port + attempt))")"
}

_signal() {
  local i
  for i in "${!hosts[@]}"; do
    "${ssh[@]}" -o ConnectTimeout=10 "${hosts[i]}" \
      "cd $(_quote "$folder") && kill -$1 \$(cat .pid-$i)" 2>/dev/null < /dev/null || true
  done
  [ "$1" != KILL ] || kill "${pids[@]}" 2>/dev/null || true  # connections to hosts that do not answer
}

# Through ssh's input: scp has another way to write ports and IPv6.
_stage() {
  local host
  _pack
  for host in "${hosts[@]}"; do
    if [ "$dry_run" ]; then
      echo "$(_quote "${ssh[@]}" "$host" "$(_unpack -)") < $archive"
    else
      "${ssh[@]}" "$host" "$(_unpack -)" < "$archive" || _fail "the code did not get to $host (see above)"
    fi
  done
  rm -f "$archive"
}

_read_options "$@"
[ ${#hosts[@]} -gt 0 ] || _fail "no hosts: give --hosts=HOST,HOST"
for host in "${hosts[@]}"; do
  [[ $host =~ ^[^-] ]] || _fail "'$host' in --hosts is no name of a host"
done
_find_address
_check_hosts
_check_address
_stage
_attempts ${#hosts[@]}
