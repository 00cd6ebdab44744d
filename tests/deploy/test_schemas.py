"""Every object is one that an API server takes: by Kubernetes' own schemas, or by the definition of its kind."""

import copy
import functools
from pathlib import Path

import kubernetes_validate
import pytest

from tests.deploy import schemas
from tests.deploy.rendering import COMPONENTS, OVERLAYS, Tree, combine, completed, documents, pods, ray_service

OLDEST, NEWEST = "1.30", "1.37"
"""preStop.sleep is on by default from 1.30 on; 1.37 is the newest with a published schema."""

IMAGE_VOLUME_SINCE = "1.31"

CORE_GROUPS = ("v1", "policy/v1", "networking.k8s.io/v1", "scheduling.k8s.io/v1", "batch/v1")
WITHOUT_DEFINITION = {"Gateway", "ScrapeConfig"}
"""Custom resources whose definitions nobody gave us; read by a person only."""


@functools.cache
def definitions() -> dict[tuple[str, str], Tree]:
    """Return the schemas of custom resources; skip where there are none."""
    if not schemas.FOLDER.is_dir():
        pytest.skip(f"no custom resource definitions in {schemas.FOLDER}; name their folder with VAE_CRD_DIR")
    return schemas.schemas()


def custom(objects: tuple[Tree, ...]) -> list[Tree]:
    """Return the custom resources among objects."""
    return [each for each in objects if each["apiVersion"] not in CORE_GROUPS]


@pytest.mark.parametrize("version", [OLDEST, "1.34", NEWEST])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_core_objects_are_valid(overlay: str, version: str) -> None:
    """No field is misspelt, missing or of another type, in the oldest, a middle and the newest Kubernetes."""
    checked = [each for each in documents(overlay) if each["apiVersion"] in CORE_GROUPS]
    assert len(checked) > 5
    for each in checked:
        kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_valid(overlay: str) -> None:
    """The templates inside the RayService, whose own definition repeats only a part of what a pod must be."""
    has_image_volume = overlay != "cpu"
    for version in (IMAGE_VOLUME_SINCE if has_image_volume else OLDEST, NEWEST):
        for pod in pods(overlay).values():
            kubernetes_validate.validate(pod, version, strict=True)


def test_a_misspelt_field_of_a_pod_is_found() -> None:
    """Strict means strict: what is not known is refused."""
    pod = copy.deepcopy(pods("cpu")["gateway"])
    pod["spec"]["terminationGracePeriodSecond"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriodSecond"):
        kubernetes_validate.validate(pod, NEWEST, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_custom_resources_are_valid(overlay: str) -> None:
    """RayService, GRPCRoute, PodMonitor: as the API server validates them, and no unknown fields."""
    checked = [each for each in custom(documents(overlay)) if each["kind"] not in WITHOUT_DEFINITION]
    assert "RayService" in {each["kind"] for each in checked}
    for each in checked:
        schema = definitions()[each["apiVersion"], each["kind"]]
        assert not list(schemas.faults(schema, each)), each["metadata"]["name"]


@pytest.mark.parametrize("component", COMPONENTS)
def test_each_component_alone_is_valid(component: str, tmp_path: Path) -> None:
    """Any of them goes on the base by itself."""
    import yaml  # noqa: PLC0415 - one parse

    objects = tuple(yaml.safe_load_all(completed(combine(tmp_path, [component]))))
    for each in objects:
        if each["apiVersion"] in CORE_GROUPS:
            kubernetes_validate.validate(each, NEWEST, strict=True)
        elif each["kind"] not in WITHOUT_DEFINITION:
            assert not list(schemas.faults(definitions()[each["apiVersion"], each["kind"]], each))


def test_a_misspelt_field_of_a_custom_resource_is_found() -> None:
    """The schemas that are used here refuse what they do not know."""
    service = copy.deepcopy(ray_service("cpu"))
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][2]["minReplica"] = 1
    found = list(schemas.faults(definitions()[service["apiVersion"], "RayService"], service))
    assert len(found) == 1
    assert "minReplica" in found[0]


def test_definitions_are_given_for_all_but_those_listed() -> None:
    """A kind leaves the list of exceptions when its definition comes."""
    kinds = {kind for _, kind in definitions()}
    used = {each["kind"] for overlay in OVERLAYS for each in custom(documents(overlay))}
    assert used - kinds == WITHOUT_DEFINITION
