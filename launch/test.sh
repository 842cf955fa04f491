#!/usr/bin/env bash
# Sets up the environment when needed and passes the tests. Arguments go on to pytest, e.g. --slow or -k config.
set -eu
case ${1:-} in -h | --help)
  echo "usage: bash launch/test.sh [--slow] [pytest arguments]    e.g. bash launch/test.sh -k config"
  exit ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
exec "$python" -m pytest -q --numprocesses=2 --dist=loadfile --no-loadscope-reorder tests "$@"
