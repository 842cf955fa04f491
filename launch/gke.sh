#!/usr/bin/env bash
# Kubernetes (GKE): builds the image, and starts a JobSet that restarts all pods where one fails. Status 2 of
# av_mae.train (wrong input) ends it at once. With --xpk the same as a workload of XPK.
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/hosts.sh"
name=av-mae image= accelerator= topology= chips=4 nodes=1 gpus=0 xpk= cluster= account=
# A checkpoint is a folder that gets its name at last; what one pod writes the others look for at once.
gcsfuse=implicit-dirs,rename-dir-limit=200000,metadata-cache:negative-ttl-secs:0
volumes=() buckets=() places=()  # NAME:/PATH of both, and all paths that are shared

_usage() {
  echo "usage: bash launch/gke.sh --image=IMAGE [options] -- --config=… --workdir=…
  --image=IMAGE        where the image goes, e.g. europe-docker.pkg.dev/PROJECT/REPOSITORY/av_mae:1
  --name=NAME          of the JobSet (av-mae)
  --nodes=N            pods, one on each node (1)
  --accelerator=TYPE   of TPU nodes, e.g. tpu-v5-lite-podslice; with --topology=4x4 and --chips=N on each node (4)
  --gpus=N             GPUs of each node, instead of TPUs
  --volume=CLAIM:/PATH    mounts a persistent volume claim, one that all nodes may write (ReadWriteMany)
  --bucket=BUCKET:/PATH   mounts a bucket with gcsfuse (the cluster's add-on GcsFuseCsiDriver)
  --service_account=NAME  of Kubernetes, that may use the bucket
  --xpk=TYPE --cluster=NAME   give it to XPK instead, with its name of the TPU type, e.g. v5litepod-16
  --mounted=/PATH      where a storage lies that XPK attaches
$COMMON
--workdir must lie in one of these, or on gs://; volumes and buckets may be several.
Stop it with: kubectl delete jobset NAME
example: bash launch/gke.sh --image=IMAGE --nodes=4 --accelerator=tpu-v5-lite-podslice --topology=4x4 \\
           --bucket=BUCKET:/mnt/bucket --dry-run -- --config=configs/pretrain.py:base --workdir=/mnt/bucket/base"
}

_option() {
  case $1 in
    --image=*) image=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --nodes=* | --chips=* | --gpus=*)
      [[ ${1#*=} =~ ^[0-9]{1,6}$ ]] || _fail "$1 must be a whole number"
      printf -v "$(expr "$1" : '--\([a-z]*\)')" %s "${1#*=}" ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --volume=*) _mount "$1" && volumes+=("${1#*=}") ;;
    --bucket=*) _mount "$1" && buckets+=("${1#*=}") ;;
    --service_account=*) account=${1#*=} ;;
    --mounted=*) places+=("${1#*=}") ;;
    --xpk=*) xpk=${1#*=} ;;
    --cluster=*) cluster=${1#*=} ;;
    *) return 1 ;;
  esac
}

# The path of --volume=NAME:/PATH or --bucket=NAME:/PATH; /av_mae is the image's code.
_mount() {
  [[ ${1#*=} =~ ^[a-z0-9][a-z0-9._-]*:/[A-Za-z0-9._/-]*[A-Za-z0-9_-]$ ]] && [[ $1 != *:/av_mae* ]] ||
    _fail "$1 must read ${1%%=*}=NAME:/PATH, e.g. ${1%%=*}=data:/mnt/data, and not lie in /av_mae"
  places+=("${1#*:}")
}

# Refuses names that Kubernetes would not take: those of pods must stay below 64 characters.
_check_names() {
  [[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] || _fail "--name=$name must be of at most 40 of a-z, 0-9 and -"
  [[ $account =~ ^([a-z0-9]([a-z0-9.-]*[a-z0-9])?)?$ ]] || _fail "--service_account=$account is no name in Kubernetes"
}

# On another place each pod would write to a disk of its own, which goes with the pod.
_check_workdir() {
  local word before='' workdir='' place
  for word in "${train[@]}"; do
    [ "$before" != --workdir ] || workdir=$word
    [[ $word != --workdir=* ]] || workdir=${word#*=}
    before=$word
  done
  [[ $workdir != gs://?* ]] || return 0
  for place in "${places[@]}"; do
    [[ $workdir/ != "${place%/}"/* ]] || [[ $workdir/ == */../* ]] || return 0
  done
  _fail "--workdir=$workdir lies on nothing that all pods share: give --volume=CLAIM:/PATH or --bucket=BUCKET:/PATH" \
    "and a folder in it, or gs://…"
}

# Words as a YAML list in one line (JSON strings are YAML).
_list() {
  local word line=
  for word in "$@"; do
    word=${word//\\/\\\\}
    line="$line, \"${word//\"/\\\"}\""
  done
  echo "[${line#, }]"
}

# TPU pods find each other by GKE's variables, GPU pods by JAX's.
_nodes() {
  [ "$gpus" = 0 ] || return 0
  echo "            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $accelerator
              cloud.google.com/gke-tpu-topology: $topology"
}

_devices() {
  if [ "$gpus" = 0 ]; then
    echo "              resources: {limits: {google.com/tpu: $chips}}"
  else
    echo "              resources: {limits: {nvidia.com/gpu: $gpus}}
              env:
              - {name: JAX_COORDINATOR_ADDRESS, value: \"$name-workers-0-0.$name:$port\"}
              - {name: JAX_NUM_PROCESSES, value: \"$nodes\"}
              - {name: XLA_FLAGS, value: --xla_gpu_enable_latency_hiding_scheduler=true}"
  fi
}

# What the container mounts, and where that comes from. Data workers hand batches over in /dev/shm, of 64 MB by default.
_mounts() {
  local i=0 place
  echo "              volumeMounts:
              - {name: shm, mountPath: /dev/shm}"
  for place in "${volumes[@]}" "${buckets[@]}"; do
    echo "              - {name: volume-$((i++)), mountPath: \"${place#*:}\"}"
  done
}

_volumes() {
  local i=0 place
  echo "            volumes:
            - {name: shm, emptyDir: {medium: Memory}}"
  for place in "${volumes[@]}"; do
    echo "            - {name: volume-$((i++)), persistentVolumeClaim: {claimName: \"${place%%:*}\"}}"
  done
  for place in "${buckets[@]}"; do
    echo "            - name: volume-$((i++))
              csi:
                driver: gcsfuse.csi.storage.gke.io
                volumeAttributes:
                  bucketName: \"${place%%:*}\"
                  mountOptions: \"$gcsfuse\""
  done
}

_jobset() {
  echo "apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
    - {name: wrongInput, action: FailJobSet, onJobFailureReasons: [PodFailurePolicy]}
  replicatedJobs:
  - name: workers
    replicas: 1
    template:
      spec:
        parallelism: $nodes
        completions: $nodes
        completionMode: Indexed
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - {action: FailJob, onExitCodes: {containerName: train, operator: In, values: [2]}}
        template:"
  [ ${#buckets[@]} = 0 ] || echo "          metadata:
            annotations: {gke-gcsfuse/volumes: \"true\"}"
  echo "          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120"
  [ -z "$account" ] || echo "            serviceAccountName: \"$account\""
  _nodes
  _volumes
  echo "            containers:
            - name: train
              image: $image
              args: $(_list --stopped_status=$RESTART "${train[@]}")"
  _mounts
  _devices
}

_apply() {
  if [ "$dry_run" ]; then
    echo "kubectl apply -f - <<'END'"
    _jobset
    echo END
  else
    _jobset | kubectl apply -f -
  fi
}

_read_options "$@"
[ "$image" ] || _fail "no image: give --image=IMAGE"
[ "$gpus" != 0 ] || [ "$xpk" ] || { [ "$accelerator" ] && [ "$topology" ]; } ||
  _fail "which nodes? give --accelerator=TYPE and --topology=AxB, or --gpus=N, or --xpk=TYPE"
if [ "$xpk" ]; then
  [ "$cluster" ] || _fail "--xpk=$xpk needs --cluster=NAME"
  [ "${volumes[*]}${buckets[*]}$account" = "" ] ||
    _fail "XPK mounts what xpk storage attach names: give --mounted=/PATH, not --volume, --bucket or --service_account"
fi
_check_names
_check_workdir
[ "$gpus" = 0 ] && extra=tpu || extra=cuda
_run docker build --build-arg "EXTRA=$extra" --tag "$image" --file "$root/launch/Dockerfile" "$root"
_run docker push "$image"
if [ "$xpk" ]; then
  _run xpk workload create --cluster="$cluster" --workload="$name" --docker-image="$image" --tpu-type="$xpk" \
    --max-restarts="$restarts" \
    --command="python -m av_mae.train $(_quote --coordinator=auto --stopped_status=$RESTART "${train[@]}")"
  exit
fi
_apply
_run mkdir -p "$logs"
follow=(kubectl logs --follow --prefix "--max-log-requests=$nodes" "--selector=jobset.sigs.k8s.io/jobset-name=$name")
if [ "$dry_run" ]; then
  _show "${follow[@]}"
  exit
fi
# Pods of a restart are new ones: what they say is followed until the JobSet has ended.
until [ "$(kubectl get jobset "$name" --output='jsonpath={.status.terminalState}')" ]; do
  "${follow[@]}" >> "$logs/all.log" 2>&1 || true
  sleep "$pause"
done
state=$(kubectl get jobset "$name" --output='jsonpath={.status.terminalState}')
echo "JobSet $name: $state; output in $logs/all.log" >&2
[ "$state" = Completed ]
