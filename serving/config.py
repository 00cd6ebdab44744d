"""Every number of the service, with its unit, range and reason, in one typed tree."""

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from serving.typed_config import Config, ConfigError

MIB = 2**20
MAX_MESSAGE_BYTES = 2**31 - 1 - 64 * 1024
"""What gRPC's limit, a 32-bit integer, can hold beside the overhead of a message."""


class BatchingConfig(Config):
    """How rows of concurrent requests become runs of a graph."""

    max_batch_rows: int = Field(default=512, ge=1, le=65_536)
    """Most rows in one run of a graph. With 128 calls of 64 rows in flight, 512 gave 1.14 (in-process) and 1.55
    (Ray) times the Encode throughput of 128."""

    max_in_flight: int | None = Field(default=None, ge=1, le=64)
    """Runs in flight while rows gather; by default what the engine can overlap. A full batch goes out beyond it,
    so that pressure shows as ongoing calls to Serve's autoscaler."""

    max_gather_s: float = Field(default=0.002, ge=0, le=1)
    """Longest time rows gather for a free slot while more keep coming, seconds."""

    max_full_in_flight: int = Field(default=8, ge=1, le=256)
    """Most runs in flight when batches are full."""

    max_queue_rows: int = Field(default=16_384, ge=1)
    """Rows that wait or run, per graph; above it calls are shed."""

    max_queue_bytes: int = Field(default=256 * MIB, ge=MIB)
    """Bytes of the rows that wait or run, per graph; above it calls are shed."""

    stall_after_s: float = Field(default=10.0, gt=0)
    """Time without a finished run, rows waiting, after which health fails, seconds."""


class LimitsConfig(Config):
    """What one call may ask for."""

    max_rows: int = Field(default=4096, ge=1, le=1_000_000)
    """Most rows in one call, counted after expansion."""

    max_latents_per_row: int = Field(default=64, ge=1, le=4096)
    """Most latents that Encode draws from one posterior."""

    max_request_bytes: int = Field(default=16 * MIB, ge=64 * 1024, le=MAX_MESSAGE_BYTES)
    """Largest request message, bytes: 4,096 MNIST images as float32 are 12.8 MB."""

    max_response_bytes: int = Field(default=64 * MIB, ge=64 * 1024, le=MAX_MESSAGE_BYTES)
    """Largest answer, bytes. A bug fails instead of flooding."""

    default_deadline_s: float = Field(default=10.0, gt=0)
    """Time given to a call that brings no deadline, seconds."""

    max_deadline_s: float = Field(default=60.0, gt=0)
    """Longest time a call may take, seconds; longer deadlines are cut to it."""


class GatewayConfig(Config):
    """The process that speaks gRPC."""

    host: str = "127.0.0.1"
    """Address to listen on. Loopback by default: there is no transport security yet."""

    port: int = Field(default=50051, ge=0, le=65_535)
    """Port to listen on; 0 lets the system choose (in-process engine only)."""

    reflection: bool = True
    """Whether server reflection describes the API to tools."""

    metrics_port: int | None = Field(default=None, ge=0, le=65_535)
    """Port of the Prometheus endpoint; none by default. A failed bind is logged, never fatal."""

    num_cpus: float = Field(default=1.0, gt=0)
    """Processors reserved for the gateway's replica."""

    drain_quiet_s: float = Field(default=0.2, gt=0)
    """A drain ends when nothing was in flight and nothing arrived for this long, seconds."""

    drain_timeout_s: float = Field(default=15.0, gt=0)
    """Longest drain, seconds."""

    stop_grace_s: float = Field(default=5.0, ge=0)
    """Time that calls still running after the drain are given, seconds."""


class ReplicasConfig(Config):
    """The replicas of one graph."""

    num_cpus: float = Field(default=1.0, gt=0)
    """Processors reserved for a replica; also the threads of its session (at least one)."""

    num_gpus: float | None = Field(default=None, ge=0)
    """Share of a GPU reserved for a replica. By default none on `cpu` and one half on `cuda`, so that both graphs
    fit one GPU."""

    min_replicas: int = Field(default=1, ge=1)
    """Fewest replicas."""

    max_replicas: int = Field(default=1, ge=1)
    """Most replicas. Above `min_replicas`, Serve scales the deployment on its ongoing batch calls."""

    attempt_timeout_s: float = Field(default=10.0, gt=0)
    """Time for one run on a replica, after which it is tried again elsewhere, seconds."""

    max_attempts: int = Field(default=3, ge=1, le=10)
    """Times one run is tried when its replica is lost."""


class ServingConfig(Config):
    """The whole service."""

    bundle: str = ""
    """Folder or URL of the bundle. Must be given, here or on the command line."""

    engine: Literal["ray", "in-process"] = "ray"
    """Who runs the graphs: Ray Serve deployments, or ONNX Runtime in the gateway's process."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where the graphs run. If CUDA is asked for and cannot be used, the service does not start."""

    start_timeout_s: float = Field(default=120.0, gt=0)
    """Time for the deployments to come up, seconds."""

    gateway: GatewayConfig = GatewayConfig()
    """The process that speaks gRPC."""

    encoder: ReplicasConfig = ReplicasConfig()
    """Replicas of the encoder."""

    decoder: ReplicasConfig = ReplicasConfig()
    """Replicas of the decoder."""

    batching: BatchingConfig = BatchingConfig()
    """How rows become runs."""

    limits: LimitsConfig = LimitsConfig()
    """What one call may ask for."""

    def gpu_share(self, graph: Literal["encoder", "decoder"]) -> float:
        """Return the share of a GPU that a replica of a graph reserves."""
        own = (self.encoder if graph == "encoder" else self.decoder).num_gpus
        return own if own is not None else {"cpu": 0.0, "cuda": 0.5}[self.device]


def load(path: Path | None, **values: object) -> ServingConfig:
    """Return the configuration of a YAML file with `values` (those that are not None) over it.

    Raises:
        ConfigError: If the file cannot be read, a key is unknown or a value is out of range.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = yaml.safe_load(path.read_text()) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"configuration file {path}: {error}") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"configuration file {path}: expected keys and values")
    tree |= {key: value for key, value in values.items() if value is not None}
    return ServingConfig.parse(tree)


def session_threads(num_cpus: float) -> int:
    """Return the threads of a session: the replica's share, at most what the machine has."""
    return max(1, min(int(num_cpus), os.cpu_count() or 1))


def address_of(host: str, port: int) -> str:
    """Return host and port as one address; an IPv6 host is put in brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
