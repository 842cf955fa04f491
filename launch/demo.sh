#!/usr/bin/env bash
# Makes both demo sets, pretrains on them and evaluates: about 15 minutes on 2 cores, installation included.
# Everything goes to WORKDIR (runs/demo). The same command again goes on where it stopped.
set -eu
case ${1:-} in -h | --help)
  echo "usage: bash launch/demo.sh [WORKDIR] [--config.KEY=VALUE ...]    further arguments go on to av_mae.train"
  echo "example: bash launch/demo.sh runs/demo --config.steps=800"
  exit ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

workdir=$root/runs/demo
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
  mkdir -p "$1"
  workdir=$(cd "$1" && pwd)
  shift
fi
cd "$root"
use_allocator glibc
data=$workdir/data
mkdir -p "$data"

"$python" -m av_mae.prepare --dataset=toy_band --output="$data/toy_band" --clips=3000 --test_clips=1500
"$python" -m av_mae.prepare --dataset=spoken_digits --output="$data/spoken_digits" --clips=1500 --test_clips=300
paths=$data/toy_band,$data/spoken_digits
"$python" -m av_mae.train --config=configs/demo.py --workdir="$workdir" --config.data.path="$paths" "$@"
"$python" -m av_mae.evaluate --config=configs/reconstruction.py:demo --workdir="$workdir/evaluation" \
  --config.data.path="$paths" --config.init="$workdir"
echo "$workdir holds checkpoints/, metrics.jsonl, TensorBoard events, images/ and evaluation/" >&2
