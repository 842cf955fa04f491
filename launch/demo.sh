#!/usr/bin/env bash
# Makes both demo sets, pretrains on them and evaluates: about 15 minutes on 2 cores, installation included.
# Everything goes to WORKDIR (runs/demo); further arguments go on to av_mae.train. AV_MAE_CLIPS: clips per set.
set -eu
case ${1:-} in -h | --help)
  echo "usage: bash launch/demo.sh [WORKDIR] [--config.KEY=VALUE ...]    e.g. bash launch/demo.sh runs/demo --config.steps=800"
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
data=$workdir/data

for name in toy_band spoken_digits; do
  if [ -e "$data/$name/dataset_info.json" ]; then
    echo "$name: already in $data/$name" >&2
  else
    "$python" -m av_mae.prepare --dataset=$name --output="$data/$name" --clips="${AV_MAE_CLIPS:-4000}" --seed=0
  fi
done
paths=$data/toy_band,$data/spoken_digits
"$python" -m av_mae.train --config=configs/demo.py --workdir="$workdir" --config.data.path="$paths" "$@"
"$python" -m av_mae.evaluate --config=configs/reconstruction.py:demo --workdir="$workdir/evaluation" \
  --config.data.path="$paths" --config.init="$workdir"
echo "everything is in $workdir: checkpoints, metrics.jsonl, TensorBoard events, images/, evaluation/" >&2
