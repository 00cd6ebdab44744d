"""Ranges, files and errors of `serving.config`."""

import os
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from serving import config as configuration
from serving.config import ServingConfig, load, session_threads
from serving.typed_config import ConfigError


def _models(model: type[BaseModel]) -> list[type[BaseModel]]:
    children = [field.annotation for field in model.model_fields.values()]
    nested = [child for child in children if isinstance(child, type) and issubclass(child, BaseModel)]
    return [model, *(deep for child in nested for deep in _models(child))]


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
        if field.annotation in {int, float, int | None} and not field.metadata
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
    ],
)
def test_values_out_of_range_are_refused_by_name(override: str) -> None:
    """The error begins with the path of the key and shows the value."""
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"^{key}: .*\(got "):
        ServingConfig.parse({"bundle": "b"}).override([override])


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
