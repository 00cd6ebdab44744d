"""Every number of the service, with its unit, range and reason, in one typed tree."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from serving.typed_config import Config, ConfigError

MIB = 2**20
MAX_MESSAGE_BYTES = 2**31 - 1 - 64 * 1024
"""What gRPC's limit, a 32-bit integer, can hold beside the overhead of a message."""

NUM_METRICS_PORTS = 32
"""Ports that are tried for the metrics of a replica, from the first on."""

AccessLogMode = Literal["all", "errors", "none"]

ROLE_LABEL = "vae.role"
"""Label of a Ray node that says what runs there: gateway, encoder, decoder, or all."""

ENVIRONMENT = "VAE__"
"""How variables begin that override a Serve config file; two underscores stand for a dot."""

MAX_BATCH_ROWS = 65_536
"""Most rows in one run of a graph that can be configured."""


def _falling_shares(shares: tuple[float, float, float]) -> tuple[float, float, float]:
    if not all(0 < share <= 1 for share in shares) or list(shares) != sorted(shares, reverse=True):
        raise ValueError("expected three shares in (0, 1], none above the one before it")
    return shares


class BatchingConfig(Config):
    """How rows of concurrent requests become runs of a graph."""

    max_batch_rows: int = Field(default=512, ge=1, le=MAX_BATCH_ROWS)
    """Most rows in one run of a graph. With 128 calls of 64 rows in flight, 512 gave 1.14 (in-process) and 1.55
    (Ray) times the Encode throughput of 128."""

    max_in_flight: int | None = Field(default=None, ge=1, le=64)
    """Runs in flight for each replica while rows gather; by default what the engine can overlap. A full batch goes
    out beyond it, so that no replica waits for the next."""

    max_gather_s: float = Field(default=0.01, ge=0, le=1)
    """Longest time rows gather for a free slot while more keep coming, seconds."""

    max_full_in_flight: int = Field(default=8, ge=1, le=256)
    """Most runs in flight for each replica when batches are full."""

    max_queue_rows: int = Field(default=16_384, ge=1)
    """Rows that wait or run, per graph; above it calls are shed."""

    max_queue_bytes: int = Field(default=256 * MIB, ge=MIB)
    """Bytes of the rows that wait or run, per graph; above it calls are shed."""

    stall_after_s: float = Field(default=10.0, gt=0)
    """Time without a finished run, rows waiting, after which health fails, seconds."""

    shed_at: tuple[float, float, float] = (1.0, 0.8, 0.5)
    """Share of the queue's bounds, in (0, 1], at which calls of priority 1, 2 and 3 are shed: what is drawn from
    the prior before what a caller has sent, and background work first."""

    age_after_s: float = Field(default=1.0, gt=0)
    """Time of waiting after which rows move up by one priority, so that none waits for ever, seconds."""

    _check_shed_at = field_validator("shed_at")(_falling_shares)


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

    max_stream_rows: int = Field(default=10_000_000, ge=1, le=2**40)
    """Most rows of one SampleStream."""

    stream_chunk_bytes: int = Field(default=MIB, ge=1024, le=64 * MIB)
    """Size of a chunk of a stream, bytes; a chunk holds at least one row. A megabyte is where gRPC's cost per
    message no longer shows and a cancelled stream has wasted little."""

    max_stream_s: float = Field(default=600.0, gt=0)
    """Longest time a stream may take, seconds. It can be resumed."""

    max_stream_calls: int = Field(default=32, ge=1, le=1024)
    """Most requests of one ModelStreamInfer that are worked on at a time; more are read when some are done."""


class TransportConfig(Config):
    """HTTP/2 and gRPC settings of the server."""

    max_metadata_bytes: int = Field(default=8192, ge=1024, le=MIB)
    """Metadata of a call above which gRPC begins to refuse it, bytes; above twice that it always does."""

    max_concurrent_streams: int | None = Field(default=None, ge=1)
    """Calls in flight on one connection; no bound by default, because gRPC refuses what is above it instead of
    letting the caller wait: of 400 calls of one honest channel and a bound of 100, 297 were lost."""

    max_pending_calls: int = Field(default=4096, ge=100, le=1_000_000)
    """Calls that gRPC has accepted and Python has not yet picked up, at some 6,000 a second. Above it gRPC ends
    calls of anybody as CANCELLED, at random from its own default of 1,000 on. More would only wait longer: under a
    flood of 20,000 calls and resets a second, 557 honest calls were answered in 20 s at 1,000 and 45 at 20,000.
    Against such floods the streams of a connection must be counted in front of the gateway."""

    handshake_timeout_s: float = Field(default=5.0, gt=0)
    """Time for a connection to say what it is, seconds. gRPC's own default, 120, lets silent sockets stay."""

    body_timeout_s: float = Field(default=10.0, gt=0)
    """Time for the body of a request to arrive, seconds. 16 MiB in 10 s are 14 Mbit/s."""

    write_timeout_s: float = Field(default=30.0, gt=0)
    """Time for a caller to take one message of a stream, seconds."""

    keepalive_time_s: float = Field(default=60.0, ge=1)
    """Silence after which a connection is asked whether it lives, seconds. With the timeout: dead peers are gone
    after 80 s rather than 2 h."""

    keepalive_timeout_s: float = Field(default=20.0, ge=1)
    """Time for the answer, seconds."""

    min_ping_interval_s: float = Field(default=300.0, ge=0)
    """Callers that ask for signs of life more often without a call are sent away, seconds."""

    max_connection_idle_s: float = Field(default=300.0, gt=0)
    """Time after which a connection without calls is closed, seconds."""

    max_connection_age_s: float = Field(default=240.0, gt=0)
    """Age at which callers are told to reconnect, with 10 % jitter, seconds: what spreads them over new gateways.
    Lossless: 0 of 5,904 calls lost at ages of 0.3 s and 1 s."""

    max_connection_age_grace_s: float = Field(default=600.0, gt=0)
    """Time for the calls of an aged connection to end, seconds: as long as the longest stream."""

    compression: Literal["identity", "gzip"] = "identity"
    """Whether messages may be compressed. Identity alone by default: a compressed request is UNIMPLEMENTED, and
    0.3 MB of gzip cannot inflate to the largest message. With gzip, inflating stops at the largest message."""


class TlsConfig(Config):
    """Transport security. Files are read again when they change; a new pair that does not fit is ignored."""

    certificate: str = ""
    """PEM file of the server's certificate chain. Empty: plaintext."""

    private_key: str = ""
    """PEM file of its key."""

    client_ca: str = ""
    """PEM file of the authorities that sign clients' certificates. A client without one is then refused in the
    handshake (gRPC for Python cannot ask without insisting). Empty: clients are not asked for one."""

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        if bool(self.certificate) != bool(self.private_key):
            raise ValueError("expected both a certificate and a private_key, or neither")
        if self.client_ca and not self.certificate:
            raise ValueError("client_ca needs a certificate and a private_key of the server")
        return self


class JwtConfig(Config):
    """JSON Web Tokens (RFC 7519) as credentials."""

    issuer: str
    """Required value of `iss`."""

    audience: str
    """Required value in `aud`."""

    jwks: str
    """File, or https URL (http on loopback), of the JSON Web Key Set (RFC 7517) of the issuer."""

    algorithms: tuple[str, ...] = Field(default=("RS256", "ES256"), min_length=1)
    """Signature algorithms that are accepted; asymmetric ones only, and never `none`."""

    leeway_s: float = Field(default=60.0, ge=0, le=600)
    """Difference of clocks that is forgiven, seconds."""

    refresh_s: float = Field(default=300.0, ge=1)
    """Age at which the key set is fetched again, seconds. An unknown key id does so earlier, at most each 10 s."""

    @field_validator("algorithms")
    @classmethod
    def _check_algorithms(cls, algorithms: tuple[str, ...]) -> tuple[str, ...]:
        known = {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}
        if unknown := set(algorithms) - known:
            raise ValueError(f"not accepted: {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
        return algorithms


class Grant(Config):
    """Lets clients call methods. Patterns know `*` and `?`."""

    clients: tuple[str, ...] = Field(min_length=1)
    """Names of clients: `key:NAME`, `jwt:SUBJECT`, `cert:COMMON NAME`."""

    methods: tuple[str, ...] = Field(min_length=1)
    """Full names of methods, such as `vae.v1.VaeService/Encode` or `inference.GRPCInferenceService/*`."""


class AuthConfig(Config):
    """Who may call. Without keys, tokens and client certificates everybody may."""

    api_keys_file: str = ""
    """YAML file of hashed API keys, as `vae-serve keys new` writes them; read again when it changes."""

    api_keys: str = ""
    """Hashed API keys: `name:sha256`, separated by commas or newlines."""

    api_keys_variable: str = "VAE_API_KEYS"
    """Environment variable with more of them."""

    jwt: JwtConfig | None = None
    """Tokens as credentials; none by default."""

    grants: tuple[Grant, ...] = ()
    """Who may call what. Without grants, whoever has credentials may call every method."""

    health: Literal["open", "authenticated"] = "open"
    """Who may ask grpc.health.v1. Probes have no credentials, and neither has the health check of gRPC's own
    channels: with `authenticated`, clients that watch it and have keys or tokens would wait for ever."""

    reflection: Literal["disabled", "authenticated", "open"] = "authenticated"
    """Who may read the API by reflection. `authenticated` is everybody where nobody needs credentials."""


class RateLimit(Config):
    """How fast one client may call: token buckets that hold `burst_s` seconds of each rate."""

    calls_per_s: float | None = Field(default=None, gt=0)
    """Calls per second; no limit by default."""

    rows_per_s: float | None = Field(default=None, gt=0)
    """Rows per second, counted when they join a queue; no limit by default."""

    burst_s: float = Field(default=1.0, gt=0, le=3600)
    """Seconds of unused rate that a client may save up."""


class AdmissionConfig(Config):
    """How many calls are let in, and how fast each client may call."""

    max_calls: int = Field(default=4096, ge=1)
    """Calls in flight in one gateway; above it calls are shed."""

    shed_at: tuple[float, float, float] = (1.0, 0.9, 0.7)
    """Share of `max_calls`, in (0, 1], at which calls of priority 1, 2 and 3 are shed."""

    max_client_share: float = Field(default=0.5, gt=0, le=1)
    """Share of `max_calls` that one client may hold while others call too."""

    max_unread_bytes: int = Field(default=256 * MIB, ge=MIB)
    """Bytes of large answers that callers have not taken yet, which gRPC holds; above it calls are shed, and those
    of one client above `max_client_share` of it."""

    rate_limit: RateLimit = RateLimit()
    """Limit of each client that has none of its own. No limit by default."""

    clients: dict[str, RateLimit] = Field(default={})
    """Limits of clients by name, such as `key:team-a`."""

    _check_shed_at = field_validator("shed_at")(_falling_shares)


class ScalingConfig(Config):
    """When the replicas of a deployment become more or fewer (Ray engine only)."""

    target_load: float = Field(default=0.7, gt=0, le=1)
    """Share of its time that a replica should work, a gateway its processor, at most."""

    drain_s: float = Field(default=1.0, gt=0)
    """Time in which rows that wait should be run: more of them mean more replicas, seconds. Graphs only."""

    up_after_s: float = Field(default=1.0, ge=0)
    """Time for which more replicas must be wanted before they are started, seconds. Reports take about two more,
    and a replica a few to start."""

    down_after_s: float = Field(default=30.0, ge=0)
    """Time for which fewer replicas must be wanted before some are stopped, seconds."""

    zero_after_s: float = Field(default=300.0, ge=0)
    """Time without work after which the last replica is stopped where `min_replicas` is 0, seconds."""


class GatewayConfig(Config):
    """The process that speaks gRPC."""

    host: str = "127.0.0.1"
    """Address to listen on. Loopback by default; elsewhere plaintext must be allowed or TLS configured."""

    port: int = Field(default=50051, ge=0, le=65_535)
    """Port to listen on; 0 lets the system choose (in-process engine only)."""

    allow_plaintext: bool = False
    """Whether plaintext may be spoken on addresses that others can reach, because something in front of the
    gateway (a mesh, an edge proxy) secures the transport."""

    num_replicas: int = Field(default=1, ge=1, le=64)
    """Gateways (Ray engine only), each on a node of its own unless they share a port; the fewest if they scale."""

    max_replicas: int = Field(default=1, ge=1, le=64)
    """Most gateways. Above `num_replicas`, their number follows the load. A new gateway gets new connections only:
    callers that are connected come to it when theirs has reached `transport.max_connection_age_s`."""

    scaling: ScalingConfig = ScalingConfig()
    """When there are more or fewer gateways."""

    share_port: bool = False
    """Whether several gateways on one machine share the port (Linux). The system then spreads connections, not
    calls, over them; and another process of the same user could take a share too, so by default a second listener
    fails."""

    metrics_port: int | None = Field(default=None, ge=0, le=65_535)
    """Port of `/metrics`, `/targets` (where Prometheus finds all processes), `/livez` and `/readyz`; none by
    default, and then the replicas have none either. A port that is taken is replaced by a free one; a failed bind
    is logged, never fatal."""

    access_log: AccessLogMode = "all"
    """Which calls have a line in the log: all, those with another code than OK (`errors`), or none."""

    num_cpus: float = Field(default=1.0, gt=0)
    """Processors reserved for the gateway's replica."""

    open_inference: bool = True
    """Whether the Open Inference Protocol is served beside the typed API."""

    repository_control: bool = False
    """Whether RepositoryModelLoad and RepositoryModelUnload may take models into and out of service."""

    drain_notice_s: float = Field(default=0.0, ge=0)
    """Time of a drain in which calls still come because load balancers have not yet heard NOT_SERVING, seconds.
    On Kubernetes: what it takes to remove an endpoint everywhere."""

    drain_quiet_s: float = Field(default=0.2, gt=0)
    """A drain ends when, after the notice, nothing was in flight and nothing arrived for this long, seconds."""

    drain_file: str = ""
    """File that begins a drain when somebody makes it, and that is removed when the drain has ended; none by
    default. On Kubernetes: how a hook of the pod drains the gateway while everything else still runs."""

    drain_timeout_s: float = Field(default=15.0, gt=0)
    """Longest wait for that, seconds, the notice not counted."""

    stop_grace_s: float = Field(default=5.0, ge=0)
    """Time that calls still running after the drain are given, seconds."""

    transport: TransportConfig = TransportConfig()
    """HTTP/2 and gRPC settings."""

    tls: TlsConfig = TlsConfig()
    """Transport security."""

    auth: AuthConfig = AuthConfig()
    """Who may call."""

    admission: AdmissionConfig = AdmissionConfig()
    """How much is let in."""


class ReplicasConfig(Config):
    """The replicas of one graph."""

    num_cpus: float = Field(default=1.0, gt=0)
    """Processors reserved for a replica; also the threads of its session (at least one)."""

    num_gpus: float | None = Field(default=None, ge=0)
    """Share of a GPU reserved for a replica. By default none on `cpu` and one half on `cuda`, so that both graphs
    fit one GPU."""

    min_replicas: int = Field(default=1, ge=0)
    """Fewest replicas. With 0 the graph may sleep: the next call then waits, within its deadline, until a replica
    is up."""

    max_replicas: int = Field(default=1, ge=1)
    """Most replicas. Above `min_replicas`, their number follows the load."""

    scaling: ScalingConfig = ScalingConfig()
    """When there are more or fewer replicas."""

    direct_runs: bool = True
    """Whether gateways send runs over connections of their own, to a port that each replica opens on its node's
    address for those with its token; off: through Serve's handle only. Where the port cannot be reached the handle
    is used anyway."""

    metrics_port: int = Field(default=0, ge=0, le=65_535)
    """First port that is tried for a replica's `/metrics`, where the gateway has any; with 0, any free one. Those
    after it are tried too, since several replicas may share a node."""

    attempt_timeout_s: float = Field(default=10.0, gt=0)
    """Time for one run on a replica, after which it is tried again elsewhere, seconds."""

    max_attempts: int = Field(default=3, ge=1, le=10)
    """Times one run is tried when its replica is lost."""


class AcceleratorConfig(Config):
    """How graphs run on a GPU. With `device: cpu` nothing here counts."""

    provider: Literal["cuda", "tensorrt"] = "cuda"
    """ONNX Runtime's execution provider. TensorRT compiles the graph at the first start, for minutes (raise
    `start_timeout_s`). What it does not know runs on CUDA; a graph of which it takes nothing is refused."""

    precision: Literal["fp32", "tf32", "fp16"] = "fp32"
    """Arithmetic of matrix products. TF32 rounds their factors to 10 bits of mantissa; fp16 does so, with a
    smaller range, to everything, by TensorRT alone and on the bundle's own bytes. TensorRT has no fp32 here: ONNX
    Runtime cannot switch its TF32 off. Each has its own tolerance for known answers, see `serving.sessions`."""

    memory_limit_bytes: int | None = Field(default=None, ge=64 * MIB)
    """Most memory of the GPU that the arena of one session may hold, bytes; no limit by default. The buffers of
    the lanes come on top. Give one where replicas share a GPU: `num_gpus` only counts shares."""

    convolution_search: Literal["default", "heuristic", "exhaustive"] = "heuristic"
    """How cuDNN chooses algorithms. Exhaustive times them, so that two replicas may round differently."""

    buckets: tuple[int, ...] = ()
    """Sizes of batches that run, in rows, ascending; smaller ones are padded with zeros. By default 1, 8, 32 and
    then doubling up to `batching.max_batch_rows`. Kernels differ with the size, so a row's last bits may depend on
    its bucket: with a single bucket every row is computed in the same way."""

    num_lanes: int = Field(default=2, ge=1, le=8)
    """Runs of one graph in flight, each on buffers and a stream of its own: the copies of one overlap the kernels
    of another. All outputs have buffers: of a categorical decoder, 0.8 MB for an MNIST row with 256 levels."""

    cuda_graphs: bool = False
    """Whether each bucket is captured as a CUDA graph at start and replayed, one launch instead of one per kernel.
    The whole graph must run on the GPU; each lane then has a session, and so weights, and a thread of its own."""

    engine_cache: str = ""
    """Folder in which TensorRT keeps engines and timings between starts. Empty: it compiles at each start. Engines
    are code that is run: nobody else may write there."""

    @field_validator("buckets")
    @classmethod
    def _check_buckets(cls, buckets: tuple[int, ...]) -> tuple[int, ...]:
        if list(buckets) != sorted(set(buckets)) or any(not 1 <= size <= MAX_BATCH_ROWS for size in buckets):
            raise ValueError(f"expected ascending numbers of rows from 1 to {MAX_BATCH_ROWS}")
        return buckets

    @model_validator(mode="after")
    def _check_precision(self) -> Self:
        if self.provider == "cuda" and self.precision == "fp16":
            raise ValueError("precision fp16 needs provider tensorrt")
        if self.provider == "tensorrt" and self.precision == "fp32":
            raise ValueError("provider tensorrt computes in tf32 or fp16: choose a precision")
        if self.provider == "tensorrt" and self.cuda_graphs:
            raise ValueError("cuda_graphs needs provider cuda: TensorRT's keeps one graph, for one size of batch")
        return self


class TracingConfig(Config):
    """OpenTelemetry traces: where the time of a call went, in every process that it went through."""

    exporter: Literal["none", "otlp"] = "none"
    """Who gets spans: nobody, or a collector by OTLP over HTTP, which needs the extra `tracing`."""

    endpoint: str = Field(default="", pattern=r"^(https?://\S+)?$")
    """Base URL of the collector, such as `http://localhost:4318`; `/v1/traces` is added. Empty: what the variables
    OTEL_EXPORTER_OTLP_* of each process say, or that."""

    sample_share: float = Field(default=0.01, ge=0, le=1)
    """Share of the calls that are traced where the caller sent no `traceparent`; one who did has decided. A traced
    call of one row costs two to three times the processor time of another, most of it in the exporter's thread."""


class ServingConfig(Config):
    """The whole service."""

    bundle: str = ""
    """Folder or URL of the bundle. Must be given, here or on the command line."""

    bundle_sha256: str = Field(default="", pattern="^([0-9a-f]{64})?$")
    """SHA-256 of the bundle's manifest.json, which holds those of its graphs: what every process then insists on.
    Empty: whatever lies there."""

    engine: Literal["ray", "in-process"] = "ray"
    """Who runs the graphs: Ray Serve deployments, or ONNX Runtime in the gateway's process."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where the graphs run. If CUDA is asked for and cannot be used, the service does not start."""

    accelerator: AcceleratorConfig = AcceleratorConfig()
    """How graphs run on a GPU."""

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

    tracing: TracingConfig = TracingConfig()
    """Which calls are followed through the processes."""

    def gpu_share(self, graph: Literal["encoder", "decoder"]) -> float:
        """Return the share of a GPU that a replica of a graph reserves."""
        own = (self.encoder if graph == "encoder" else self.decoder).num_gpus
        return own if own is not None else {"cpu": 0.0, "cuda": 0.5}[self.device]

    def bucketed_accelerator(self) -> AcceleratorConfig:
        """Return how graphs run on a GPU, with the buckets that follow from the batches where none are given."""
        buckets = self.accelerator.buckets or bucket_ladder(self.batching.max_batch_rows)
        return self.accelerator.model_copy(update={"buckets": buckets})


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


def overrides_from_environment(environ: Mapping[str, str]) -> list[str]:
    """Return the overrides that variables of a container state, by name.

    Example:
        >>> overrides_from_environment({"VAE__GATEWAY__HOST": "0.0.0.0", "VAE__DEVICE": "cuda", "HOME": "/tmp"})
        ['device=cuda', 'gateway.host=0.0.0.0']
    """
    names = sorted(name for name in environ if name.startswith(ENVIRONMENT))
    return [f"{name.removeprefix(ENVIRONMENT).lower().replace('__', '.')}={environ[name]}" for name in names]


def bucket_ladder(max_rows: int) -> tuple[int, ...]:
    """Return the sizes of batches that run on a GPU, up to the first that holds `max_rows`.

    From 32 on they double, so that fewer than half of the rows of a run are padding. Below, a run costs the same
    whatever its size, and each bucket costs time at start.

    Example:
        >>> bucket_ladder(200)
        (1, 8, 32, 64, 128, 256)
    """
    ladder = [1, 8, 32]
    while ladder[-1] < max_rows:
        ladder.append(2 * ladder[-1])
    return tuple(size for index, size in enumerate(ladder) if index == 0 or ladder[index - 1] < max_rows)


def session_threads(num_cpus: float) -> int:
    """Return the threads of a session: the replica's share, at most what the machine has."""
    return max(1, min(int(num_cpus), os.cpu_count() or 1))


def address_of(host: str, port: int) -> str:
    """Return host and port as one address; an IPv6 host is put in brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
