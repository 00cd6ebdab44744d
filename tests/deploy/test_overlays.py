"""What every render has in common: complete, in one order and namespace, clear about what is yet to fill in."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from serving import manifest_check
from serving.typed_config import ConfigError
from tests.deploy.rendering import (
    COMPONENTS,
    DEPLOY,
    DIGEST,
    GROUPS,
    KUBECTL,
    OVERLAYS,
    Tree,
    combine,
    completed,
    documents,
    kind,
    kustomize,
    pods,
    ray_service,
    templates,
    text_of,
)
from tests.deploy.test_pod_security import violations

README = (DEPLOY / "README.md").read_text()
CLUSTER_SCOPED = {"Namespace", "PriorityClass"}
MODELS = ("model-image", "model-pvc", "model-store")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_renders(overlay: str) -> None:
    """One RayService, with Serve's configuration in it and without the ConfigMap that carried it there."""
    assert len(kind(overlay, "RayService")) == 1
    assert ray_service(overlay)["spec"]["serveConfigV2"].startswith("# ")
    names = {each["metadata"]["name"] for each in kind(overlay, "ConfigMap")}
    assert not [name for name in names if name.startswith("serve-config")]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_groups_keep_their_order(overlay: str) -> None:
    """Another order is another cluster to KubeRay, and patches address groups by their place."""
    groups = ray_service(overlay)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert tuple(group["groupName"] for group in groups) == GROUPS


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_all_is_in_one_namespace(overlay: str) -> None:
    """That of the overlay, which the overlay brings, and in which only restricted pods may run."""
    (namespace,) = kind(overlay, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    names = {each["metadata"]["namespace"] for each in documents(overlay) if each["kind"] not in CLUSTER_SCOPED}
    assert names == {namespace["metadata"]["name"]}


def test_another_kubectl_renders_the_same() -> None:
    """The one that this machine has beside ours, if it has one."""
    other = next((path for path in map(shutil.which, ("kubectl",)) if path and Path(path) != KUBECTL), None)
    if other is None:
        pytest.skip("no second kubectl on this machine")
    for overlay in OVERLAYS:
        assert kustomize(DEPLOY / "overlays" / overlay, kubectl=other) == text_of(overlay)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_lacks_only_the_digest_of_the_model(overlay: str) -> None:
    """As shipped the check names it; with it nothing is left to say."""
    with pytest.raises(ConfigError) as raised:
        manifest_check.check(text_of(overlay))
    assert all("digest" in line for line in str(raised.value).splitlines())
    (summary,) = manifest_check.check(completed(text_of(overlay)))
    assert set(summary.groups) == set(GROUPS)


@pytest.mark.parametrize(
    "components", [[model, *extra] for model in MODELS for extra in ([], ["gpu", "preemptible"])]
)
def test_each_way_of_bringing_a_model_is_complete(components: list[str], tmp_path: Path) -> None:
    """Also on GPUs that may be taken away."""
    text = completed(combine(tmp_path, components))
    if "model-pvc" in components:
        text = text.replace("  VAE__GATEWAY__HOST: 0", f"  VAE__BUNDLE_SHA256: {DIGEST}\n  VAE__GATEWAY__HOST: 0")
    assert manifest_check.check(text)


def test_all_components_fit_together(tmp_path: Path) -> None:
    """All that do not exclude each other, in one cluster."""
    all_of_them = [name for name in COMPONENTS if name not in {"model-pvc", "model-store"}]
    assert manifest_check.check(completed(combine(tmp_path, all_of_them)))


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_says_what_it_is_for(component: str) -> None:
    """In its first line, and in the table of the README."""
    assert (DEPLOY / "components" / component / "kustomization.yaml").read_text().startswith("# ")
    assert f"`{component}`" in README


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_is_selected_exists(overlay: str) -> None:
    """Every selector of a Service, budget, policy, monitor or spread finds pods."""
    labels = [pod["metadata"]["labels"] for pod in pods(overlay).values()]
    wanted = [found for each in documents(overlay) for found in _selectors(each)]
    assert len(wanted) >= 10
    for selector in wanted:
        assert any(selector.items() <= each.items() for each in labels), selector


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_named_ports_exist(overlay: str) -> None:
    """What Services, policies and monitors call by name is a port of the pods that they select."""
    ports = {
        name: {port["name"] for port in template["spec"]["containers"][0]["ports"]}
        for name, template in templates(overlay).items()
    }
    for policy in kind(overlay, "NetworkPolicy"):
        selected = _selected(overlay, policy["spec"]["podSelector"].get("matchLabels", {}))
        for rule in policy["spec"].get("ingress", []):
            for port in rule.get("ports", []):
                if isinstance(port["port"], str):
                    assert any(port["port"] in ports[name] for name in selected), (
                        policy["metadata"]["name"],
                        port,
                    )
    for service in kind(overlay, "Service"):
        for name in _selected(overlay, service["spec"]["selector"]):
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports[name]
    for monitor in kind(overlay, "PodMonitor"):
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            assert any(endpoint["port"] in each for each in ports.values())


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_cells_do_not_mix(overlay: str) -> None:
    """One value of the instance label throughout, or one cell would answer for another."""
    values = re.findall(
        r"app\.kubernetes\.io/instance: (\S+)", text_of(overlay).replace("}", " ").replace(",", " ")
    )
    assert set(values) == {"vae-cell-a" if overlay == "cell-a" else "vae"}


def test_patches_stop_when_a_group_has_moved(tmp_path: Path) -> None:
    """An index that no longer means its group fails the render instead of patching another."""
    copy = tmp_path / "deploy"
    shutil.copytree(DEPLOY, copy)
    base = copy / "base/rayservice.yaml"
    base.write_text(base.read_text().replace("groupName: decoder", "groupName: other"))
    with pytest.raises(
        AssertionError, match="testing value /spec/rayClusterConfig/workerGroupSpecs/2/groupName failed"
    ):
        kustomize(copy / "overlays/gpu")


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.yaml")), ids=lambda path: str(path.relative_to(DEPLOY)))
def test_files_are_yaml_without_double_keys(path: Path) -> None:
    """A second key of the same name would silently win."""

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> Tree:
        keys = [loader.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{path}: {keys}"
        return dict(loader.construct_pairs(node, deep=True))

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    assert list(yaml.load_all(path.read_text(), Loader=Loader))


def _selectors(each: Tree) -> list[dict[str, str]]:
    """Return the labels by which an object chooses pods of its own namespace."""
    found: list[dict[str, str]] = []
    if each["kind"] == "Service":
        found.append(each["spec"]["selector"])
    if each["kind"] in {"PodDisruptionBudget", "PodMonitor"}:
        found.append(each["spec"]["selector"]["matchLabels"])
    if each["kind"] == "NetworkPolicy" and each["spec"]["podSelector"]:
        found.append(each["spec"]["podSelector"]["matchLabels"])
    if each["kind"] == "RayService":
        for group in each["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
            spread = group["template"]["spec"]["topologySpreadConstraints"]
            found += [constraint["labelSelector"]["matchLabels"] for constraint in spread]
    return found


def _selected(overlay: str, selector: dict[str, str]) -> list[str]:
    return [name for name, pod in pods(overlay).items() if selector.items() <= pod["metadata"]["labels"].items()]


def _components(folder: Path) -> set[str]:
    """Return the names of the components of a kustomization and of those that it stands on."""
    own = yaml.safe_load((folder / "kustomization.yaml").read_text())
    found = {Path(path).name for path in own.get("components", [])}
    for path in own.get("resources", []):
        if (folder / path).is_dir():
            found |= _components(folder / path)
    return found


def test_the_readme_says_which_component_is_in_which_overlay() -> None:
    """The table is true, cell by cell."""
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| [^|]+ \|([^|]*)\|([^|]*)\|([^|]*)\|$", README, re.MULTILINE)
    assert sorted(name for name, *_ in rows) == COMPONENTS
    for position, overlay in enumerate(("cpu", "gpu", "production"), start=1):
        shown = {row[0] for row in rows if row[position].strip()}
        assert shown == _components(DEPLOY / "overlays" / overlay) & set(COMPONENTS)


def test_the_commands_of_the_readme_that_need_no_cluster_work(bundle_dir: Path, tmp_path: Path) -> None:
    """The digest of the bundle is put into the overlay, and the check then has nothing to say."""
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    shutil.copytree(bundle_dir, tmp_path / "demo/bundle")
    block = README.partition("Say which model may be served")[2].partition("```console\n")[2].partition("```")[0]
    commands = [line.removeprefix("$ ") for line in block.splitlines()[:2]]
    assert [command.split()[0] for command in commands] == ["sed", "kubectl"]
    path = f"{KUBECTL.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(commands)],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(DEPLOY.parent)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "manifests agree" in done.stdout


def test_the_loader_is_a_pod_that_the_namespace_admits() -> None:
    """It is applied by hand, so nothing else here renders it."""
    pod = yaml.safe_load((DEPLOY / "components/model-pvc/loader.yaml").read_text())
    kubernetes_validate.validate(pod, "1.30", strict=True)
    assert not list(violations("loader", pod["spec"]))
