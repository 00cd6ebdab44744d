"""The composition root: what Serve is asked for. That it runs is shown in tests/end_to_end."""

from pathlib import Path
from typing import Any

import pytest

from serving.app import build, from_args
from serving.config import ServingConfig
from serving.errors import BundleError, CredentialsError
from serving.typed_config import ConfigError


def test_the_application_is_a_gateway_on_two_graphs() -> None:
    """Each graph is a deployment of its own, so that it can scale alone."""
    config = ServingConfig(bundle="b").override(["decoder.num_cpus=2", "decoder.max_replicas=5"])
    application = build(config)
    gateway: Any = application._bound_deployment  # noqa: SLF001 - Serve has no public view of an application
    graphs: dict[str, Any] = {arg._bound_deployment.name: arg._bound_deployment for arg in gateway.init_args[1:]}  # noqa: SLF001 - as above
    assert gateway.name == "Gateway"
    assert gateway._replica_config.max_replicas_per_node == 1  # noqa: SLF001 - as above
    assert set(graphs) == {"Encoder", "Decoder"}
    assert graphs["Encoder"].num_replicas == 1
    assert graphs["Decoder"].ray_actor_options["num_cpus"] == 2
    assert graphs["Decoder"]._deployment_config.autoscaling_config.max_replicas == 5  # noqa: SLF001 - as above
    assert gateway.num_replicas == 1


def test_gateways_may_scale_where_they_share_a_port() -> None:
    """Then nothing keeps two of them from one node."""
    config = ServingConfig(bundle="b").override(["gateway.share_port=true", "gateway.max_replicas=3"])
    gateway: Any = build(config)._bound_deployment  # noqa: SLF001 - as above
    assert gateway._deployment_config.autoscaling_config.max_replicas == 3  # noqa: SLF001 - as above
    assert gateway._replica_config.max_replicas_per_node is None  # noqa: SLF001 - as above


def test_the_gateway_has_time_to_drain() -> None:
    """Serve ends a replica by force after its grace: that must be longer than drain and stop."""
    config = ServingConfig(bundle="b")
    grace_s = build(config)._bound_deployment._deployment_config.graceful_shutdown_timeout_s  # noqa: SLF001 - as above
    assert grace_s > config.gateway.drain_timeout_s + config.gateway.stop_grace_s


def _deployments(application: Any) -> dict[str, Any]:  # noqa: ANN401 - as above
    gateway = application._bound_deployment  # noqa: SLF001 - as above
    return {each.name: each for each in (gateway, *(arg._bound_deployment for arg in gateway.init_args[1:]))}  # noqa: SLF001 - as above


def test_a_config_file_of_serve_places_each_deployment_on_its_nodes(
    bundle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or on nodes of all roles, as a laptop is; variables win over the file."""
    monkeypatch.setenv("VAE__BUNDLE", str(bundle_dir))
    monkeypatch.setenv("VAE__DECODER__NUM_CPUS", "3")
    found = _deployments(from_args({"bundle": "/models/vae", "decoder": {"num_cpus": 2}}))
    selectors = {name: each.ray_actor_options["label_selector"] for name, each in found.items()}
    assert selectors == {
        name: {"vae.role": f"in({name.lower()},all)"} for name in ("Gateway", "Encoder", "Decoder")
    }
    assert found["Decoder"].ray_actor_options["num_cpus"] == 3


def test_the_command_line_asks_for_no_labels() -> None:
    """A local Ray has none."""
    found = _deployments(build(ServingConfig(bundle="b")))
    assert not [each for each in found.values() if "label_selector" in each.ray_actor_options]


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ({"bundel": "x"}, ConfigError),
        ({"bundle": "/nowhere"}, BundleError),
        ({"bundle_sha256": "0" * 64}, BundleError),
        ({"gateway": {"host": "0.0.0.0"}}, CredentialsError),  # noqa: S104 - what is refused
    ],
)
def test_what_cannot_run_is_refused_before_it_is_deployed(
    args: dict[str, Any], error: type[Exception], bundle_dir: Path
) -> None:
    """Serve then keeps what ran before."""
    with pytest.raises(error):
        from_args({"bundle": str(bundle_dir)} | args)
