"""The launcher for Kubernetes: the JobSet that it writes, what it mounts, and what it refuses."""

import functools
import re
import shlex

import dry_launch
import pytest
import yaml
from dry_launch import TRAIN, words

TPU = ["--image=images/av_mae:1", "--nodes=4", "--accelerator=tpu-v5-lite-podslice", "--topology=4x4"]
GPU = ["--image=i", "--gpus=8"]


@pytest.fixture
def dry(tmp_path):
    return functools.partial(dry_launch.dry, tmp_path)


def jobset(out: str) -> dict:
    return yaml.safe_load(out.partition("kubectl apply -f - <<'END'\n")[2].partition("\nEND\n")[0])


def parts(made: dict) -> tuple[dict, dict, dict]:
    """Job, pod template and container."""
    (replicated,) = made["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    return job, job["template"], container


def test_tpu(dry):
    status, out, message = dry("gke.sh", *TPU, "--restarts=7", "--volume=data:/nfs")
    assert (status, message) == (0, "")
    build, push = words(out.partition("kubectl")[0])
    assert build[:4] == ["docker", "build", "--build-arg", "EXTRA=tpu"]
    assert push == ["docker", "push", "images/av_mae:1"]
    made = jobset(out)
    job, template, container = parts(made)
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 7 and job["backoffLimit"] == 0
    assert job["parallelism"] == job["completions"] == 4 and job["completionMode"] == "Indexed"
    assert template["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert container["args"] == ["--stopped_status=75", *TRAIN] and container["image"] == "images/av_mae:1"
    assert container["resources"]["limits"] == {"google.com/tpu": 4} and "env" not in container
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}


def test_gpu(dry):
    train = [*TRAIN, '--config.data.path=a "quoted" \\ path']
    out = dry("gke.sh", "--image=i", "--name=run", "--nodes=2", "--gpus=8", "--volume=data:/nfs", train=train)[1]
    _, template, container = parts(jobset(out))
    values = {entry["name"]: entry["value"] for entry in container["env"]}
    assert values["JAX_COORDINATOR_ADDRESS"] == "run-workers-0-0.run:8476" and values["JAX_NUM_PROCESSES"] == "2"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8} and "nodeSelector" not in template["spec"]
    assert container["args"][1:] == train


# Keys of a JobSet's custom resource (v1alpha2) and of the Job in it (batch/v1): those that must be there, then others.
# No key is written that Kubernetes does not know: it would refuse them all.
KEYS = {
    "": ("apiVersion kind metadata spec", ""),
    "spec": ("replicatedJobs", "failurePolicy successPolicy network startupPolicy suspend ttlSecondsAfterFinished"),
    "spec.failurePolicy": ("", "maxRestarts restartStrategy rules"),
    "spec.failurePolicy.rules": ("action name", "onJobFailureReasons targetReplicatedJobs"),
    "spec.replicatedJobs": ("name template", "replicas groupName dependsOn"),
    "spec.replicatedJobs.template": ("", "metadata spec"),
    "spec.replicatedJobs.template.spec": (
        "template",
        "parallelism completions completionMode backoffLimit podFailurePolicy activeDeadlineSeconds suspend",
    ),
    "spec.replicatedJobs.template.spec.podFailurePolicy": ("rules", ""),
    "spec.replicatedJobs.template.spec.podFailurePolicy.rules": ("action", "onExitCodes onPodConditions"),
    "spec.replicatedJobs.template.spec.podFailurePolicy.rules.onExitCodes": ("operator values", "containerName"),
    "spec.replicatedJobs.template.spec.template": ("", "metadata spec"),
    "spec.replicatedJobs.template.spec.template.metadata": ("annotations", "labels"),
    "spec.replicatedJobs.template.spec.template.spec": (
        "containers",
        "restartPolicy terminationGracePeriodSeconds serviceAccountName nodeSelector volumes",
    ),
    "spec.replicatedJobs.template.spec.template.spec.volumes": ("name", "emptyDir persistentVolumeClaim csi"),
    "spec.replicatedJobs.template.spec.template.spec.volumes.emptyDir": ("", "medium sizeLimit"),
    "spec.replicatedJobs.template.spec.template.spec.volumes.persistentVolumeClaim": ("claimName", "readOnly"),
    "spec.replicatedJobs.template.spec.template.spec.volumes.csi": ("driver", "volumeAttributes readOnly"),
    "spec.replicatedJobs.template.spec.template.spec.containers": ("name image", "args env resources volumeMounts"),
    "spec.replicatedJobs.template.spec.template.spec.containers.volumeMounts": ("name mountPath", "readOnly subPath"),
    "spec.replicatedJobs.template.spec.template.spec.containers.env": ("name", "value"),
    "spec.replicatedJobs.template.spec.template.spec.containers.resources": ("", "limits requests"),
}


def check_keys(made, path: str = "") -> set[str]:
    """Compares with KEYS; returns the paths that were there."""
    if isinstance(made, list):
        return set().union(*(check_keys(one, path) for one in made))
    if not isinstance(made, dict) or path not in KEYS:
        return set()
    needed, others = (set(words.split()) for words in KEYS[path])
    assert needed <= set(made) <= needed | others, path
    return {path}.union(*(check_keys(x, f"{path}.{name}".strip(".")) for name, x in made.items()))


MOUNTS = [
    "--volume=data:/mnt/data",
    "--bucket=runs-1:/mnt/bucket",
    "--bucket=more:/mnt/more",
    "--service_account=trainer",
]


@pytest.mark.parametrize("devices", [TPU, GPU])
def test_keys_are_those_of_the_resource(dry, devices):
    made = jobset(dry("gke.sh", *devices, *MOUNTS, train=["--workdir=/mnt/bucket/a"])[1])
    assert set(KEYS) - check_keys(made) <= {"spec.replicatedJobs.template.spec.template.spec.containers.env"}
    (rule,) = made["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])


def test_mounts(dry):
    status, out, message = dry("gke.sh", *GPU, *MOUNTS, train=["--workdir=/mnt/bucket/a"])
    assert (status, message) == (0, "")
    _, template, container = parts(jobset(out))
    assert template["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert template["spec"]["serviceAccountName"] == "trainer"
    sources = {volume.pop("name"): volume for volume in template["spec"]["volumes"]}
    mounted = {mount["mountPath"]: sources[mount["name"]] for mount in container["volumeMounts"]}
    assert len(mounted) == len(sources) == 4
    assert mounted["/dev/shm"] == {"emptyDir": {"medium": "Memory"}}
    assert mounted["/mnt/data"] == {"persistentVolumeClaim": {"claimName": "data"}}
    for path, bucket in {"/mnt/bucket": "runs-1", "/mnt/more": "more"}.items():
        assert mounted[path]["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
        assert mounted[path]["csi"]["volumeAttributes"]["bucketName"] == bucket


def test_without_a_bucket_no_driver_is_asked_for(dry):
    _, template, _ = parts(jobset(dry("gke.sh", *GPU, train=["--workdir", "gs://runs/a"])[1]))
    assert "metadata" not in template and "serviceAccountName" not in template["spec"]


@pytest.mark.parametrize("workdir", ["/mnt/data/a", "/mnt/data/a b", "/mnt/bucket", "gs://bucket/a"])
def test_workdirs_that_all_pods_share(dry, workdir):
    for train in ([f"--workdir={workdir}"], ["--workdir", workdir], ["--workdir=/elsewhere", f"--workdir={workdir}"]):
        assert dry("gke.sh", *GPU, "--volume=data:/mnt/data", "--bucket=b:/mnt/bucket", train=train)[0] == 0


@pytest.mark.parametrize("workdir", ["/mnt/database/a", "/mnt", "runs/a", "/mnt/data/../a", "/gs://a", "gs://", None])
def test_workdirs_of_each_pod_alone_are_refused(dry, workdir):
    train = ["--config=a"] + ([f"--workdir={workdir}"] if workdir else [])
    status, out, message = dry("gke.sh", *GPU, "--volume=data:/mnt/data", train=train)
    assert status == 2 and out == "" and len(message.splitlines()) == 1
    assert message.startswith(
        f"error: --workdir={workdir or ''} lies on nothing that all pods share: give --volume=CLAIM:"
    )


def test_xpk(dry):
    xpk = ["--image=i", "--xpk=v5litepod-16", "--cluster=c", "--restarts=3", "--mounted=/nfs"]
    status, out, _ = dry("gke.sh", *xpk)
    xpk = words(out)[-1]
    assert status == 0 and xpk[:4] == ["xpk", "workload", "create", "--cluster=c"] and "--max-restarts=3" in xpk
    command = shlex.split(xpk[-1].removeprefix("--command="))
    assert command == ["python", "-m", "av_mae.train", "--coordinator=auto", "--stopped_status=75", *TRAIN]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--gpus=8"], "no image: give --image=IMAGE"),
        (["--image=i"], "which nodes? give --accelerator=TYPE and --topology=AxB, or --gpus=N"),
        (["--image=i", "--xpk=v5litepod-16"], "needs --cluster=NAME"),
        (["--image=i", "--xpk=v", "--cluster=c", "--mounted=/a"], "--workdir=/nfs/a b lies on nothing that all pods"),
        (["--image=i", "--xpk=v", "--cluster=c", "--bucket=b:/nfs"], "give --mounted=/PATH, not --volume, --bucket or"),
        ([*GPU, "--volume=data"], "--volume=data must read --volume=NAME:/PATH, e.g. --volume=data:/mnt/data"),
        ([*GPU, "--bucket=gs://b:/mnt"], "--bucket=gs://b:/mnt must read --bucket=NAME:/PATH"),
        ([*GPU, "--bucket=b:mnt"], "must read --bucket=NAME:/PATH"),
        ([*GPU, "--volume=data:/av_mae/runs"], "and not lie in /av_mae"),
        ([*GPU, "--volume=data:/nfs", "--name=My_Run"], "--name=My_Run must be of at most 40 of a-z, 0-9 and -"),
        ([*GPU, "--volume=data:/nfs", "--service_account=a b"], "--service_account=a b is no name in Kubernetes"),
        ([*GPU, "--nodes=two"], "--nodes=two must be a whole number"),
    ],
)
def test_refused(dry, options, message):
    status, out, said = dry("gke.sh", *options)
    assert status == 2 and said.startswith("error: ") and message in said and len(said.splitlines()) == 1 and out == ""
