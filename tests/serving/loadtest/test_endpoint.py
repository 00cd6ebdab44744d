"""How processes reach the service. TLS and keys over the wire: tests/serving/test_load_command.py."""

import pickle
from pathlib import Path

from serving.client import SERVICE_CONFIG
from serving.loadtest import endpoint as module
from serving.loadtest.endpoint import Endpoint


def test_it_crosses_processes() -> None:
    """Each process has its own copy."""
    given = Endpoint(target="a:1", is_tls=True, ca=b"PEM", api_key="k", priority=2, retries=True)
    assert pickle.loads(pickle.dumps(given)) == given  # noqa: S301 - our own bytes


def test_metadata_says_who_calls_and_how_urgent_it_is(tmp_path: Path) -> None:
    """A token is read at the time, so that it may be replaced."""
    token = tmp_path / "token"
    token.write_text("first\n")
    assert Endpoint(target="a").metadata() == ()
    assert Endpoint(target="a", api_key="k").metadata() == (("authorization", "Bearer k"),)
    given = Endpoint(target="a", token_file=token, priority=3)
    assert given.metadata() == (("authorization", "Bearer first"), ("vae-priority", "3"))
    token.write_text("second")
    assert given.metadata()[0] == ("authorization", "Bearer second")


def test_retries_are_the_published_ones_for_both_protocols() -> None:
    """The client's configuration is extended by the other service, and is itself left as it is."""
    before = repr(SERVICE_CONFIG)
    config = module._service_config()  # noqa: SLF001 - the channel shows no configuration
    names = config["methodConfig"][0]["name"]
    assert names == [{"service": "vae.v1.VaeService"}, {"service": "inference.GRPCInferenceService"}]
    assert config["methodConfig"][0]["retryPolicy"] == SERVICE_CONFIG["methodConfig"][0]["retryPolicy"]
    assert repr(SERVICE_CONFIG) == before
