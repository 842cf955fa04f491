#!/usr/bin/env bash
# Installs av_mae for a notebook's Python (the first argument, else python3), with JAX for its accelerator and any
# further EXTRAS of setup.py. Nothing is done where it is installed already.
set -eu
python=${1:-python3}
case $python in -h | --help)
  echo "usage: bash launch/colab.sh [PYTHON [EXTRA[,EXTRA]]]"
  exit ;;
esac
if "$python" -c 'from importlib.metadata import version; version("av_mae")' 2>/dev/null; then
  exit
fi
extras=colab${2:+,$2}
if command -v nvidia-smi > /dev/null; then
  extras=$extras,cuda
elif ls /dev/accel* /dev/vfio/[0-9]* > /dev/null 2>&1; then
  extras=$extras,tpu
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
"$python" -m pip install --quiet --disable-pip-version-check --constraint launch/requirements.lock \
  --editable ".[$extras]"
