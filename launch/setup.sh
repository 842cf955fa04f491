# shellcheck shell=bash
# Sourced by demo.sh, test.sh and host.sh: makes the virtual environment when it is missing or out of date and sets
#   root    the repository
#   python  the environment's Python
# AV_MAE_VENV: another place for the environment than .venv. AV_MAE_PYTHON: the Python to make it with.
# AV_MAE_EXTRA: tpu or cuda, JAX with the libraries of an accelerator.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${AV_MAE_VENV:-$root/.venv}
python=$venv/bin/python

_fail() {
  echo "error: $1" >&2
  exit 2
}

# The first Python >= 3.11 that runs and can make environments; the versions that the lock was tested with come first.
_find_python() {
  local name version seen=
  for name in ${AV_MAE_PYTHON:-python3.11 python3.12 python3.13 python3 python3.14 python}; do
    version=$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    if ! "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      seen="$seen $name is $version,"
    elif ! "$name" -c 'import venv, ensurepip' 2>/dev/null; then
      seen="$seen $name ($version) cannot make environments (on Debian: apt install python3-venv),"
    else
      found=$name
      return
    fi
  done
  _fail "av_mae needs Python 3.11 or newer;${seen:- none found,} install one or name it with AV_MAE_PYTHON"
}

# What the environment was made from: another lock, setup.py, place or Python makes it anew.
_fingerprint() {
  echo "$root${AV_MAE_EXTRA:+[$AV_MAE_EXTRA]} $("$python" --version 2>&1)" \
    "$(cat "$root/launch/requirements.lock" "$root/setup.py" | cksum)"
}

_install() {
  _find_python
  echo "making the environment $venv with $("$found" --version) (about 2 minutes)" >&2
  "$found" -m venv --clear "$venv" || _fail "cannot make the environment $venv; AV_MAE_VENV names another place"
  "$python" -m pip install --quiet --disable-pip-version-check --requirement "$root/launch/requirements.lock" ||
    _fail "the package index did not give what launch/requirements.lock lists (see above)"
  "$python" -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable "$root" ||
    _fail "av_mae itself did not install (see above)"
  if [ "${AV_MAE_EXTRA:-}" ]; then
    # The lock has JAX's version; the accelerator's libraries are those that this JAX asks for.
    "$python" -m pip install --quiet --disable-pip-version-check --no-build-isolation \
      --constraint "$root/launch/requirements.lock" --editable "${root}[$AV_MAE_EXTRA]" ||
      _fail "the extra $AV_MAE_EXTRA did not install (see above)"
  fi
  _fingerprint > "$venv/made_from"
}

if [ ! -x "$python" ] || [ "$(cat "$venv/made_from" 2>/dev/null)" != "$(_fingerprint)" ]; then
  _install
fi

# Arrays come and go with every step, and glibc gives their pages back to the system each time: on a CPU a fourth of the
# processor time goes there. An allocator that keeps them is preloaded where one is installed; what the user has set
# stays. `use_allocator glibc`: else glibc keeps them too, which long runs should not have: their memory may grow.
use_allocator() {
  local library folder
  [ "$(uname)" = Linux ] && [ -z "${LD_PRELOAD:-}${MALLOC_TRIM_THRESHOLD_:-}" ] || return 0
  for folder in "/usr/lib/$(uname -m)-linux-gnu" /usr/lib64; do
    for library in libtcmalloc_minimal.so.4 libtcmalloc.so.4 libjemalloc.so.2; do
      if [ -e "$folder/$library" ]; then
        export LD_PRELOAD=$folder/$library TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD=1000000000000
        echo "allocator: $LD_PRELOAD" >&2
        return 0
      fi
    done
  done
  if [ "${1:-}" = glibc ]; then
    export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_ARENA_MAX=1
    echo "allocator: glibc, which keeps its memory (with Debian's libtcmalloc-minimal4 CPUs do more)" >&2
  fi
}
