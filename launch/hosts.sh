# shellcheck shell=bash
# Sourced by the launchers of several processes: options, dry run, staging, restarts, logs. A launcher defines
#   _usage          prints its help
#   _start I        starts process I in the background; its output goes to $log; sets pids[I]
#   _signal NAME    sends a signal to all processes
# and may define
#   _option WORD    takes an option of its own; fails where it has none of that name
#   _prepare        called before each attempt
# Exit statuses of av_mae.train: 0 finished; 2 wrong input; 130 interrupted; 75 start all again; above 128 killed by a
# signal, or ssh lost its connection. The last two start all processes again, --restarts times at most.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
RESTART=75
dry_run= extra= restarts=20 pause=10 patience=150 port=8476 logs=$root/runs/logs/$(date +%Y%m%d-%H%M%S) folder=av_mae
train=() pids=() statuses=() stopping= attempt=0

COMMON="  --dry-run         print what would run, and run nothing
  --restarts=N      start all again at most N times (20)
  --pause=SECONDS   before a restart (10)
  --patience=S      how long the others may take to end after one has failed, before they are killed (150: more than
                    av_mae.train --host_timeout)
  --logs=DIR        output of each process of each attempt (runs/logs/<time>)
Everything after -- goes to python -m av_mae.train."

_fail() {
  echo "error: $*" >&2
  exit 2
}

_option() {
  return 1
}

_prepare() {
  :
}

# Reads the options up to --; the rest are train's.
_read_options() {
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help)
        _usage
        exit ;;
      --)
        shift
        train=("$@")
        break ;;
      --dry-run) dry_run=1 ;;
      --restarts=* | --pause=* | --patience=* | --port=*)
        [[ ${1#*=} =~ ^[0-9]+$ ]] || _fail "$1 must be a whole number"
        printf -v "$(expr "$1" : '--\([a-z]*\)')" %s "${1#*=}" ;;
      --logs=*) logs=${1#*=} ;;
      --folder=*) folder=${1#*=} ;;
      *) _option "$1" || _fail "unknown option $1; arguments of av_mae.train come after --" ;;
    esac
    shift
  done
  [ ${#train[@]} -gt 0 ] || _fail "no arguments for av_mae.train: give -- --config=… --workdir=…"
}

# Prints a command in a dry run, runs it otherwise.
_run() {
  if [ "$dry_run" ]; then
    _show "$@"
  else
    "$@"
  fi
}

# Words as one line that a shell reads back.
_quote() {
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line="$line $word"
  done
  printf %s "${line# }"
}

_show() {
  _quote "$@"
  echo
}

# The command of process I: _train I COUNT [COORDINATOR]; without COORDINATOR the environment tells.
_train() {
  local words=(env AV_MAE_EXTRA="$extra" bash launch/host.sh)
  [ "${3:-}" ] && words+=(--coordinator="$3")
  [ "${3:-auto}" = auto ] || words+=(--process_id="$1" --process_count="$2")
  _quote "${words[@]}" --stopped_status=$RESTART "${train[@]}"
}

# Whether a file that git does not track is code: by its name, in the root or a folder of code, and of at most 1 MB.
_is_code() {
  case $1 in
    av_mae/*.json | configs/*.json | tests/*.json | av_mae/*.css | launch/Dockerfile) ;;
    av_mae/* | configs/* | launch/* | tests/*) _is_text "$1" ;;
    */*) return 1 ;;
    *) _is_text "$1" ;;  # of the root, where a .json is rather a key
  esac && [ -f "$root/$1" ] && [ "$(wc -c < "$root/$1")" -le 1000000 ]
}

_is_text() {
  [[ $1 =~ \.(py|sh|toml|cfg|ini|in|md|txt|lock)$ ]]
}

# Sets code: tracked files that are there and new ones that are code; unsent: new ones that are not, nor ignored.
_list_code() {
  local name
  git -C "$root" rev-parse --git-dir > /dev/null || _fail "git tells what to send: $root must be a clone of it"
  code=() unsent=()
  while IFS= read -r -d '' name; do
    [ ! -f "$root/$name" ] && [ ! -L "$root/$name" ] || code+=("$name")
  done < <(git -C "$root" ls-files -z --cached)
  while IFS= read -r -d '' name; do
    if _is_code "$name"; then code+=("$name"); else unsent+=("$name"); fi
  done < <(git -C "$root" ls-files -z --others --exclude-standard)
}

# A file with the code as it lies here, and in .staged the names in it.
_pack() {
  local made
  archive=$(mktemp -t av_mae.XXXXXX.tar.gz)
  [ -z "$dry_run" ] || return 0
  _list_code
  [ ${#unsent[@]} = 0 ] ||
    echo "not sent: ${#unsent[@]} new files that are no code: $(_quote "${unsent[@]:0:3}") … (git add sends them)" >&2
  made=$(mktemp -d)
  printf '%s\0' "${code[@]}" | LC_ALL=C sort -zu > "$made/.staged"
  tar -czf "$archive" -C "$root" --null --files-from="$made/.staged" -C "$made" .staged
  rm -r "$made"
}

# The command of a host that unpacks an archive (-: its input). What was staged before and is gone here goes there too:
# all hosts must have the same code. A checkout is left as it is.
_unpack() {
  local into
  into=$(_quote "$folder")
  echo "mkdir -p $into && cd $into && { [ ! -f .staged ] || cp .staged .staged-before; } && tar -xzf $1 &&" \
    "{ [ -e .git ] || [ ! -f .staged-before ] || LC_ALL=C comm -z -23 .staged-before .staged | xargs -0 rm -f --; }"
}

# Waits for all pids. Once one has failed, the others get $patience seconds before they are killed.
_wait_all() {
  local left=$patience failed= alive i
  statuses=()
  while :; do
    alive=
    for i in "${!pids[@]}"; do
      [ "${statuses[i]:-}" ] && continue
      if kill -0 "${pids[i]}" 2>/dev/null; then
        alive=1
        continue
      fi
      statuses[i]=0
      wait "${pids[i]}" || statuses[i]=$?
      [ "${statuses[i]}" = 0 ] || failed=1
    done
    [ "$alive" ] || return 0
    if [ "$failed" ] && [ $((left--)) = 0 ]; then
      echo "process ${#statuses[@]} of ${#pids[@]} ended, the others do not within $patience s: killed" >&2
      _signal KILL
    fi
    sleep 1
  done
}

# What the statuses of all processes mean: done, again, or a status to end with.
_judge() {
  local status worst=0
  for status in "$@"; do
    case $status in
      0) ;;
      2 | 130) echo "$status" && return ;;
      75) worst=again ;;
      *) [ "$status" -gt 128 ] && worst=again || { [ "$worst" = again ] || worst=$status; } ;;
    esac
  done
  [ "$worst" = 0 ] && echo "done" || echo "$worst"
}

_stop() {
  stopping=1
  echo "asked to stop: every process saves its state" >&2
  _signal TERM
}

# Starts processes 0 … COUNT - 1 again and again until they are done, asked to stop, or wrong.
_attempts() {
  local count=$1 i verdict
  trap _stop TERM INT
  while :; do
    _prepare
    pids=()
    log=$logs/attempt-$attempt
    _run mkdir -p "$log"
    for ((i = 0; i < count; i++)); do
      _start "$i"
    done
    [ "$dry_run" ] && return 0
    echo "attempt $attempt: $count processes, output in $log/" >&2
    _wait_all
    [ ${#statuses[@]} = "$count" ] || _fail "only ${#statuses[@]} of $count processes could be started"
    verdict=$(_judge "${statuses[@]}")
    echo "attempt $attempt ended with statuses ${statuses[*]}" >&2
    [ "$verdict" = "done" ] && return 0
    tail -n 3 "$log"/* >&2
    [ "$stopping" ] && return $RESTART
    [ "$verdict" = again ] || return "$verdict"
    [ $((attempt++)) -lt "$restarts" ] || _fail "not done after $restarts restarts; see $logs"
    sleep "$pause"
    [ -z "$stopping" ] || return $RESTART  # asked to meanwhile
  done
}

# Starts a command in the background with its output in the log of process I, or prints it.
_background() {
  local i=$1
  shift
  if [ "$dry_run" ]; then
    _show "$@"
    return
  fi
  "$@" > "$log/$i.log" 2>&1 < /dev/null &
  pids[i]=$!
}
