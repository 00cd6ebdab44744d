"""Overlays and combinations of components as kubectl renders them, and views of what came out."""

import functools
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import yaml

Tree = dict[str, Any]

ROOT: Final = Path(__file__).parents[2]
DEPLOY: Final = ROOT / "deploy"
KUBECTL: Final = Path(sys.executable).parent / "kubectl"
OVERLAYS: Final = sorted(path.name for path in (DEPLOY / "overlays").iterdir())
COMPONENTS: Final = sorted(path.name for path in (DEPLOY / "components").iterdir())
DIGEST: Final = "ab" * 32
"""Stands for what an operator knows and this repository cannot: a digest of an image or a bundle."""

GROUPS: Final = ("gateway", "encoder", "decoder")


def kustomize(folder: Path, *, kubectl: Path | str = KUBECTL) -> str:
    """Return what `kubectl kustomize` prints."""
    done = subprocess.run(
        [kubectl, "kustomize", folder], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert done.returncode == 0, f"{folder}: {done.stderr}"
    return done.stdout


@functools.cache
def text_of(overlay: str) -> str:
    """Return an overlay as it is shipped."""
    return kustomize(DEPLOY / "overlays" / overlay)


def completed(text: str) -> str:
    """Return a render in which the operator has put the digests."""
    return (
        text.replace("vae-bundle:replace-with-digest", f"vae-bundle@sha256:{DIGEST}")
        .replace("replace-with-digest", DIGEST)
        .replace("replace-with-url", "https://models.example/vae")
    )


@functools.cache
def _documents(text: str) -> tuple[Tree, ...]:
    return tuple(yaml.load_all(text, Loader=yaml.CSafeLoader))


def documents(overlay: str) -> tuple[Tree, ...]:
    """Return the objects of an overlay. Do not change them."""
    return _documents(text_of(overlay))


def kind(overlay: str, name: str) -> list[Tree]:
    """Return the objects of one kind."""
    return [document for document in documents(overlay) if document["kind"] == name]


def ray_service(overlay: str) -> Tree:
    """Return the RayService."""
    (found,) = kind(overlay, "RayService")
    return found


def templates(overlay: str) -> dict[str, Tree]:
    """Return the pod templates of head and groups, by name."""
    return templates_of(ray_service(overlay))


def templates_of(service: Tree) -> dict[str, Tree]:
    """Return the pod templates of a RayService: those of its head and its groups."""
    cluster = service["spec"]["rayClusterConfig"]
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"]} | groups


def pods(overlay: str) -> dict[str, Tree]:
    """Return what KubeRay would make of the templates: pods, with the labels that it adds."""
    return {
        name: {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                **template["metadata"],
                "name": name,
                "labels": template["metadata"]["labels"]
                | {
                    "ray.io/group": "headgroup" if name == "head" else name,
                    "ray.io/node-type": "head" if name == "head" else "worker",
                    "ray.io/cluster": "vae-abcde",
                },
            },
            "spec": template["spec"],
        }
        for name, template in templates(overlay).items()
    }


def environment(overlay: str, pod: str) -> dict[str, str]:
    """Return the variables of a Ray container."""
    container = templates(overlay)[pod]["spec"]["containers"][0]
    maps = {each["metadata"]["name"]: each["data"] for each in kind(overlay, "ConfigMap")}
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        found |= maps[source["configMapRef"]["name"]]
    return found | {each["name"]: each["value"] for each in container.get("env", [])}


def serve_config(overlay: str) -> Tree:
    """Return what Serve is given."""
    config: Tree = yaml.safe_load(ray_service(overlay)["spec"]["serveConfigV2"])
    return config


def combine(folder: Path, components: Sequence[str]) -> str:
    """Return the base with components, rendered from a copy of the folder."""
    copy = folder / "deploy"
    if not copy.exists():
        shutil.copytree(DEPLOY, copy)
    own = copy / "overlays" / ("with-" + "-".join(components))
    own.mkdir()
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "vae",
        "resources": ["../../base"],
        "components": [f"../../components/{name}" for name in components],
        "images": [
            {"name": "vae-serving", "newTag": "1"},
            {"name": "vae-bundle", "newTag": "replace-with-digest"},
        ],
    }
    (own / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return kustomize(own)
