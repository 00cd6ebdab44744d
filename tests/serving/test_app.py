"""The composition root: what Serve is asked for. That it runs is shown in tests/end_to_end."""

from typing import Any

from serving.app import build
from serving.config import ServingConfig


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
