#!/usr/bin/env bash
# Kubernetes (GKE): builds the image, and starts a JobSet that restarts all pods where one fails. Status 2 of
# av_mae.train (wrong input) ends it at once. With --xpk the same as a workload of XPK.
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/hosts.sh"
name=av-mae image= accelerator= topology= chips=4 nodes=1 gpus=0 xpk= cluster=

_usage() {
  echo "usage: bash launch/gke.sh --image=IMAGE [options] -- --config=… --workdir=…
  --image=IMAGE        where the image goes, e.g. europe-docker.pkg.dev/PROJECT/REPOSITORY/av_mae:1
  --name=NAME          of the JobSet (av-mae)
  --nodes=N            pods, one on each node (1)
  --accelerator=TYPE   of TPU nodes, e.g. tpu-v5-lite-podslice; with --topology=4x4 and --chips=N on each node (4)
  --gpus=N             GPUs of each node, instead of TPUs
  --xpk=TYPE --cluster=NAME   give it to XPK instead, with its name of the TPU type, e.g. v5litepod-16
$COMMON
--workdir must be a volume that all pods share. Stop it with: kubectl delete jobset NAME
example: bash launch/gke.sh --image=IMAGE --nodes=4 --accelerator=tpu-v5-lite-podslice --topology=4x4 --dry-run -- \\
           --config=configs/pretrain.py:base --workdir=/mnt/bucket/base"
}

_option() {
  case $1 in
    --image=*) image=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --nodes=*) nodes=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --chips=*) chips=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --xpk=*) xpk=${1#*=} ;;
    --cluster=*) cluster=${1#*=} ;;
    *) return 1 ;;
  esac
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

_jobset() {
  echo "apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
    - {action: FailJobSet, onJobFailureReasons: [PodFailurePolicy]}
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
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120"
  _nodes
  echo "            containers:
            - name: train
              image: $image
              args: $(_list --stopped_status=$RESTART "${train[@]}")"
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
[ "$gpus" = 0 ] && extra=tpu || extra=cuda
_run docker build --build-arg "EXTRA=$extra" --tag "$image" --file "$root/launch/Dockerfile" "$root"
_run docker push "$image"
if [ "$xpk" ]; then
  [ "$cluster" ] || _fail "--xpk=$xpk needs --cluster=NAME"
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
