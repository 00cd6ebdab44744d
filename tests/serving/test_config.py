"""Ranges, files and errors of `serving.config`."""

import os
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from serving import config as configuration
from serving.config import (
    AcceleratorConfig,
    ServingConfig,
    bucket_ladder,
    load,
    overrides_from_environment,
    session_threads,
)
from serving.typed_config import ConfigError


def _models(model: type[BaseModel]) -> list[type[BaseModel]]:
    nested = [child for field in model.model_fields.values() for child in _nested(field.annotation)]
    return [model, *(deep for child in nested for deep in _models(child))]


def _nested(annotation: object) -> list[type[BaseModel]]:
    """Return the models in the type of a field, also those in `X | None`, tuples and dictionaries."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [child for part in get_args(annotation) for child in _nested(part)]


def test_every_section_is_looked_at() -> None:
    """The laws below reach the sections inside lists, dictionaries and options."""
    assert {"JwtConfig", "Grant", "RateLimit", "TlsConfig", "TransportConfig"} <= {
        model.__name__ for model in _models(ServingConfig)
    }


def test_every_field_says_what_it_means() -> None:
    """Each number of the service has a docstring: meaning, unit, reason."""
    bare = [
        f"{model.__name__}.{name}"
        for model in _models(ServingConfig)
        for name, field in model.model_fields.items()
        if not field.description
    ]
    assert not bare


def test_every_number_has_a_range() -> None:
    """No number is free: a typo by a thousand is refused, not served."""
    free = [
        f"{model.__name__}.{name}"
        for model in _models(ServingConfig)
        for name, field in model.model_fields.items()
        if field.annotation in {int, float, int | None, float | None} and not field.metadata
    ]
    assert not free


@pytest.mark.parametrize(
    "override",
    [
        "batching.max_batch_rows=0",
        "batching.max_in_flight=0",
        "batching.max_queue_rows=0",
        "batching.stall_after_s=0",
        "limits.max_rows=0",
        "limits.max_rows=1000001",
        "limits.max_request_bytes=1024",
        "limits.max_request_bytes=2147483648",
        "limits.default_deadline_s=-1",
        "limits.max_deadline_s=0",
        "limits.max_deadline_s=.nan",
        "gateway.port=65536",
        "gateway.port=-1",
        "gateway.port=ssh",
        "gateway.drain_quiet_s=0",
        "gateway.stop_grace_s=-1",
        "encoder.num_cpus=0",
        "encoder.num_gpus=-1",
        "decoder.max_attempts=11",
        "engine=grpc",
        "device=tpu",
        "start_timeout_s=0",
        "bundle=null",
        "batching.age_after_s=0",
        "limits.max_stream_rows=0",
        "limits.stream_chunk_bytes=1023",
        "limits.max_stream_s=0",
        "limits.max_stream_calls=0",
        "gateway.transport.max_metadata_bytes=100",
        "gateway.transport.max_concurrent_streams=0",
        "gateway.transport.body_timeout_s=0",
        "gateway.transport.write_timeout_s=-1",
        "gateway.transport.keepalive_time_s=0.5",
        "gateway.transport.compression=deflate",
        "gateway.num_replicas=0",
        "gateway.max_replicas=0",
        "encoder.min_replicas=-1",
        "encoder.max_replicas=0",
        "decoder.scaling.target_load=0",
        "decoder.scaling.target_load=1.1",
        "decoder.scaling.drain_s=0",
        "decoder.scaling.up_after_s=-1",
        "gateway.auth.health=closed",
        "gateway.auth.reflection=maybe",
        "gateway.admission.max_calls=0",
        "gateway.admission.max_client_share=0",
        "gateway.admission.max_client_share=1.1",
        "gateway.admission.rate_limit.calls_per_s=0",
        "gateway.admission.rate_limit.rows_per_s=-1",
        "gateway.admission.rate_limit.burst_s=0",
    ],
)
def test_values_out_of_range_are_refused_by_name(override: str) -> None:
    """The error begins with the path of the key and shows the value."""
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"^{key}: .*\(got "):
        ServingConfig.parse({"bundle": "b"}).override([override])


@pytest.mark.parametrize(
    "shares",
    [(1.0, 0.8), (1.0, 0.8, 0.5, 0.2), (0.5, 0.8, 1.0), (1.0, 0.8, 0.0), (1.1, 0.8, 0.5), (1.0, -0.1, -0.2)],
)
def test_shares_of_the_queue_fall_with_the_priority(shares: tuple[float, ...]) -> None:
    """Three shares in (0, 1], the most urgent first; anything else is refused by name."""
    with pytest.raises(ConfigError, match=r"^batching\.shed_at"):
        ServingConfig.parse({"bundle": "b", "batching": {"shed_at": shares}})
    with pytest.raises(ConfigError, match=r"^gateway\.admission\.shed_at"):
        ServingConfig.parse({"bundle": "b", "gateway": {"admission": {"shed_at": shares}}})


@pytest.mark.parametrize("shares", [(1.0, 1.0, 1.0), (0.9, 0.9, 0.1)])
def test_shares_of_the_queue_may_be_equal(shares: tuple[float, ...]) -> None:
    """Who wants no difference between priorities says so."""
    assert ServingConfig.parse({"batching": {"shed_at": shares}}).batching.shed_at == shares


@pytest.mark.parametrize(
    ("tls", "problem"),
    [
        ({"certificate": "server.pem"}, "expected both a certificate and a private_key"),
        ({"private_key": "server.key"}, "expected both a certificate and a private_key"),
        ({"client_ca": "ca.pem"}, "client_ca needs a certificate"),
    ],
)
def test_half_of_a_transport_security_is_refused(tls: dict[str, str], problem: str) -> None:
    """A certificate without its key, or clients' certificates without TLS, would be a false safety."""
    with pytest.raises(ConfigError, match=rf"^gateway\.tls: .*{problem}"):
        ServingConfig.parse({"gateway": {"tls": tls}})


@pytest.mark.parametrize("algorithm", ["none", "HS256", "NONE", "", "RS1"])
def test_algorithms_that_prove_nothing_are_refused(algorithm: str) -> None:
    """Tokens are verified with public keys alone: neither `none` nor a shared secret can be switched on."""
    jwt = {"issuer": "i", "audience": "a", "jwks": "keys.json", "algorithms": ["RS256", algorithm]}
    with pytest.raises(ConfigError, match=r"^gateway\.auth\.jwt\.algorithms: .*not accepted"):
        ServingConfig.parse({"gateway": {"auth": {"jwt": jwt}}})


def test_an_empty_grant_is_refused() -> None:
    """A grant without clients or methods lets nobody do anything, and looks as if it did."""
    for clients, methods in (((), ("*",)), (("*",), ())):
        with pytest.raises(ConfigError, match=r"^gateway\.auth\.grants\.0\."):
            ServingConfig.parse({"gateway": {"auth": {"grants": [{"clients": clients, "methods": methods}]}}})


def test_a_file_is_read_and_values_go_over_it(tmp_path: Path) -> None:
    """Values that are not None win over the file; the file wins over defaults."""
    path = tmp_path / "serving.yaml"
    path.write_text("bundle: a\nengine: in-process\nlimits: {max_rows: 8}\n")
    config = load(path, bundle="b", engine=None)
    assert (config.bundle, config.engine, config.limits.max_rows) == ("b", "in-process", 8)


def test_a_configuration_survives_a_file(tmp_path: Path) -> None:
    """What is dumped as YAML loads as the same configuration."""
    config = ServingConfig.parse({"bundle": "b"}).override(["gateway.metrics_port=9090", "encoder.num_gpus=0.25"])
    path = tmp_path / "serving.yaml"
    path.write_text(yaml.safe_dump(config.model_dump()))
    assert load(path) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n", "expected keys and values"),
        (b"bundle: [", "while parsing"),
        (b"bundle: b\nport: 1\n", "^port: Extra inputs are not permitted$"),
        (b"bundle: \xff\xfe\n", "configuration file"),
        (b"bundle: 2024-13-01\n", "configuration file"),
    ],
)
def test_a_wrong_file_is_one_readable_error(tmp_path: Path, content: bytes, message: str) -> None:
    """Whatever is wrong with a file is a ConfigError."""
    path = tmp_path / "serving.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A path that does not exist is an error with the path."""
    with pytest.raises(ConfigError, match=r"configuration file .*none\.yaml: .*No such file"):
        load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("device", "own", "expected"),
    [("cpu", None, 0.0), ("cuda", None, 0.5), ("cuda", 0.25, 0.25), ("cpu", 1.0, 1.0)],
)
def test_both_graphs_fit_one_gpu_by_default(device: str, own: float | None, expected: float) -> None:
    """A replica takes half a GPU on CUDA, none on CPU, or what it is told."""
    values = {"bundle": "b", "device": device, "encoder": {"num_gpus": own}}
    config = ServingConfig.parse(values)
    assert config.gpu_share("encoder") == expected
    assert config.gpu_share("decoder") == {"cpu": 0.0, "cuda": 0.5}[device]


@pytest.mark.parametrize(("num_cpus", "expected"), [(0.25, 1), (1.0, 1), (1.9, 1), (1e6, os.cpu_count())])
def test_threads_of_a_session_are_its_share(num_cpus: float, expected: int) -> None:
    """At least one thread, at most what the machine has."""
    assert session_threads(num_cpus) == expected


def test_only_loopback_is_listened_on_by_default() -> None:
    """Without transport security, nobody outside the machine may call unless told."""
    assert configuration.GatewayConfig().host == "127.0.0.1"


@pytest.mark.parametrize("max_rows", [1, 2, 8, 9, 31, 32, 33, 64, 500, 512, 513, 65_536])
def test_the_buckets_hold_a_batch_and_waste_less_than_half(max_rows: int) -> None:
    """Every batch up to the largest has a bucket; from 33 rows on more than half of the bucket is rows."""
    ladder = bucket_ladder(max_rows)
    assert list(ladder) == sorted(set(ladder))
    assert ladder[-1] >= max_rows
    assert len(ladder) == 1 or ladder[-2] < max_rows
    for num_rows in range(33, max_rows + 1, 7):
        assert min(size for size in ladder if size >= num_rows) < 2 * num_rows


def test_buckets_follow_the_batches_unless_given() -> None:
    """`batching.max_batch_rows` decides the largest; what is configured stays."""
    batches = {"batching": {"max_batch_rows": 64}}
    assert ServingConfig.parse(batches).bucketed_accelerator().buckets == (1, 8, 32, 64)
    given = batches | {"accelerator": {"buckets": [256], "num_lanes": 3}}
    assert ServingConfig.parse(given).bucketed_accelerator() == AcceleratorConfig(buckets=(256,), num_lanes=3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"precision": "fp16"}, "precision fp16 needs provider tensorrt"),
        ({"provider": "tensorrt"}, "provider tensorrt computes in tf32 or fp16"),
        ({"provider": "tensorrt", "precision": "fp16", "cuda_graphs": True}, "cuda_graphs needs provider cuda"),
        ({"buckets": [8, 1]}, "ascending numbers of rows from 1"),
        ({"buckets": [8, 8]}, "ascending numbers of rows from 1"),
        ({"buckets": [0, 8]}, "ascending numbers of rows from 1"),
    ],
)
def test_what_a_gpu_cannot_do_is_refused(values: dict[str, object], message: str) -> None:
    """At once, on any machine, not at the first start on a GPU."""
    with pytest.raises(ConfigError, match=message):
        ServingConfig.parse({"accelerator": values})


def test_variables_of_a_container_are_overrides() -> None:
    """Two underscores are a dot; what does not begin with VAE__ is not ours."""
    environment = {"VAE__GATEWAY__HOST": "127.0.0.2", "VAE__DEVICE": "cuda", "VAE_BUNDLE": "x", "HOME": "/"}
    changed = ServingConfig().override(overrides_from_environment(environment))
    assert (changed.gateway.host, changed.device, changed.bundle) == ("127.0.0.2", "cuda", "")


def test_a_misspelt_variable_is_refused() -> None:
    """It would do nothing, without a word."""
    with pytest.raises(ConfigError, match=r"gateway\.hots"):
        ServingConfig().override(overrides_from_environment({"VAE__GATEWAY__HOTS": "x"}))
