#!/usr/bin/env bash
# Runs av_mae.train in one process on this host, with the environment made where it is missing; launchers call it.
# Arguments go on to python -m av_mae.train. AV_MAE_EXTRA=tpu or cuda: JAX with its accelerator libraries.
set -eu
case ${1:-} in -h | --help)
  echo "usage: bash launch/host.sh --config=… --workdir=… [av_mae.train arguments]"
  exit ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec 9> .setup.lock  # several processes of a host, or of hosts that share this folder, make one environment
flock 9
source launch/setup.sh
exec 9>&-
use_allocator
echo $$ > "${AV_MAE_PID:-$root/.pid}"
exec "$python" -m av_mae.train "$@"
