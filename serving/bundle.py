"""The disk contract: encoder.onnx, decoder.onnx, manifest.json and MODEL_CARD.md in one folder.

Shared with training, which writes what serving reads. A reader trusts nothing: it compares sizes and SHA-256
digests, takes the graphs as bytes (so that no graph can refer to other files), and leaves the known answers
to `runtime`, which runs them.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, BinaryIO, Final, Literal, NamedTuple, Self

import fsspec
import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, model_validator

from serving import noise
from serving.errors import BundleError
from serving.typed_config import Config

MANIFEST: Final = "manifest.json"
MODEL_CARD: Final = "MODEL_CARD.md"
FORMAT_VERSION: Final = 1
SHA256_DIGITS: Final = 64
MAX_ROW_ELEMENTS: Final = 2**24
MAX_MANIFEST_BYTES: Final = 4 * 2**20
MAX_GRAPH_BYTES: Final = 2**31

GOLDEN_SEED: Final = 20_131_220
"""Seed of the known answers: the day arXiv 1312.6114 was submitted."""

GOLDEN_ROWS: Final = 4
GOLDEN_VALUES: Final = 16

Graph = Literal["encoder", "decoder"]
DecoderOutput = Literal["mean", "logits", "log_var"]
"""What the decoder computes of p(x | z). The mean in [0, 1], (batch, *data_shape), always. The rest by likelihood:

- Bernoulli: `logits` (batch, *data_shape), log odds of a one.
- Gaussian: `log_var` (batch, 1, ..., 1) or (batch, *data_shape), natural logarithm of the variance of intensities.
- categorical: `logits` (batch, num_levels, *data_shape), unnormalised log probabilities of the levels.
"""

_EXPORT_AGAIN: Final = "export it again with vae-train export"


def _bounded(shape: tuple[int, ...]) -> tuple[int, ...]:
    if math.prod(shape) > MAX_ROW_ELEMENTS:
        raise ValueError(f"expected at most {MAX_ROW_ELEMENTS} elements in one row")
    return shape


class GraphFile(Config):
    """One ONNX graph of a bundle."""

    path: str = Field(pattern=r"^[A-Za-z0-9_-]+\.onnx$")
    """File name inside the bundle; never a path."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of the file."""

    size_bytes: int = Field(gt=0, lt=MAX_GRAPH_BYTES)
    """Size of the file, bytes."""

    inputs: tuple[str, ...] = Field(min_length=1)
    """Names of the inputs, in order."""

    outputs: tuple[str, ...] = Field(min_length=1)
    """Names of the outputs, in order."""


class Dataset(Config):
    """What the model was fitted to."""

    name: str
    """Name of the data set."""

    split: str
    """How rows were divided into training, validation and test."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of the unpacked training data."""


class KnownAnswer(Config):
    """What one output of a graph is for the golden rows."""

    graph: Graph
    """Graph that the output belongs to."""

    output: str
    """Name of the output."""

    first: tuple[float, ...]
    """First values of the output, flattened."""

    total: float
    """Sum of all values of the output."""


class Manifest(Config):
    """Everything that serving and a reader need to know about a bundle."""

    format_version: Literal[1] = FORMAT_VERSION
    """Version of this layout."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of the model."""

    version: str = Field(pattern=r"^[0-9a-f]{12}$")
    """First twelve hexadecimal digits of the SHA-256 over the digests of both graphs."""

    created: str
    """End of training, ISO 8601, UTC. Taken from the checkpoint, so that exports repeat byte for byte."""

    data_shape: Annotated[tuple[Annotated[int, Field(ge=1)], ...], AfterValidator(_bounded)] = Field(min_length=1)
    """Shape of one row of data."""

    latent_dim: int = Field(ge=1, le=65_536)
    """Dimensions of one row of latents."""

    data_range: tuple[float, float] = (0.0, 255.0)
    """Range of the encoder's input: pixel units. The graph divides by the upper end."""

    prior: Literal["standard_normal"] = "standard_normal"
    """p(z)."""

    likelihood: Literal["bernoulli", "gaussian", "categorical"] = "bernoulli"
    """Family of p(x | z): of binary pixels; a density over intensities in [0, 1]; of levels of intensity."""

    num_levels: int | None = Field(default=None, ge=2, le=256)
    """Levels of a categorical likelihood, equally spaced over [0, 1]; absent for the others."""

    noise: str = noise.ALGORITHM
    """Algorithm that turns seeds into noise."""

    opset: int
    """ONNX operator set of the graphs."""

    ir_version: int
    """ONNX intermediate representation of the graphs."""

    tool_versions: dict[str, str]
    """Versions of the libraries that made the bundle."""

    dataset: Dataset
    """What the model was fitted to."""

    config_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of the resolved training configuration."""

    seed: int
    """Seed of the training run."""

    metrics: dict[str, float]
    """Figures on the test split, nats per row where they are bounds; k, n and standard error beside each."""

    parity: dict[str, float]
    """Largest difference between PyTorch and ONNX Runtime at export, per output."""

    encoder: GraphFile
    """Graph from data to (mean, log_var)."""

    decoder: GraphFile
    """Graph from latents to the mean and the parameters of the likelihood, see `DecoderOutput`."""

    golden: tuple[KnownAnswer, ...]
    """What each output is for the golden rows."""

    @property
    def data_size(self) -> int:
        """Elements in one row of data."""
        return int(np.prod(self.data_shape))

    def to_json(self) -> str:
        """Return the manifest as it stands on disk; what is absent is left out, as older readers expect it."""
        return self.model_dump_json(indent=2, exclude_none=True) + "\n"

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        if (self.num_levels is not None) != (self.likelihood == "categorical"):
            raise ValueError("num_levels is for a categorical likelihood, which needs it, and for no other")
        _bounded((self.num_levels or 1, *self.data_shape))
        return self


class Bundle(NamedTuple):
    """A verified bundle in memory."""

    manifest: Manifest
    encoder: bytes
    decoder: bytes


def version_of(encoder: bytes, decoder: bytes) -> str:
    """Return the version of a model from its two graphs."""
    return _sha256(f"{_sha256(encoder)}\n{_sha256(decoder)}\n".encode())[:12]


def graph_file(path: str, graph: bytes, *, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> GraphFile:
    """Describe a graph for the manifest."""
    return GraphFile(path=path, sha256=_sha256(graph), size_bytes=len(graph), inputs=inputs, outputs=outputs)


def golden_data(data_shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the golden rows of data in pixel units, shape (GOLDEN_ROWS, *data_shape)."""
    unit = noise.uniform(GOLDEN_SEED, GOLDEN_ROWS, int(np.prod(data_shape)), stream=noise.Stream.GOLDEN)
    pixels: NDArray[np.float32] = np.floor(unit * np.float32(256))
    return pixels.reshape(GOLDEN_ROWS, *data_shape)


def golden_latents(latent_dim: int) -> NDArray[np.float32]:
    """Return the golden rows of latents, shape (GOLDEN_ROWS, latent_dim)."""
    return noise.normal(GOLDEN_SEED, GOLDEN_ROWS, latent_dim, stream=noise.Stream.GOLDEN)


def known_answer(graph: Graph, output: str, values: NDArray[np.float32]) -> KnownAnswer:
    """Summarise one output for the golden rows."""
    flat = values.astype(np.float64).ravel()
    first = tuple(flat[:GOLDEN_VALUES].tolist())
    return KnownAnswer(graph=graph, output=output, first=first, total=float(flat.sum()))


def write(
    directory: Path,
    *,
    manifest: Manifest,
    encoder: bytes,
    decoder: bytes,
    extra: Mapping[str, bytes],
) -> None:
    """Write a bundle: complete or not at all, in place of an older bundle.

    Args:
        directory: Folder of the bundle; created. An existing bundle there is replaced.
        manifest: Description of the graphs.
        encoder: The encoder's graph.
        decoder: The decoder's graph.
        extra: Further files by relative path, such as the model card.

    Raises:
        BundleError: If the folder exists and is not a bundle.
    """
    is_bundle = (directory / MANIFEST).exists()
    if directory.is_file() or (directory.exists() and any(directory.iterdir()) and not is_bundle):
        raise BundleError(
            location=directory.name,
            problem="it exists and is not a bundle",
            remedy="name another folder",
        )
    files = {
        manifest.encoder.path: encoder,
        manifest.decoder.path: decoder,
        **extra,
        MANIFEST: manifest.to_json().encode(),
    }
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name, content in files.items():
            target = partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    retired = directory.with_name(f".{directory.name}.{os.getpid()}.retired")
    if directory.exists():
        directory.rename(retired)
    partial.rename(directory)
    shutil.rmtree(retired, ignore_errors=True)


def read_manifest(location: str, *, sha256: str = "") -> Manifest:
    """Read and validate the manifest of a bundle.

    Args:
        location: A folder, or a URL that fsspec knows (file, http, s3, gs, memory).
        sha256: Digest that the manifest must have; any if empty.

    Raises:
        BundleError: If it is missing, not a manifest, or not the one asked for.
    """
    raw = _read(location, MANIFEST, MAX_MANIFEST_BYTES)
    if len(raw) > MAX_MANIFEST_BYTES:
        problem = f"{MANIFEST} is larger than {MAX_MANIFEST_BYTES} bytes"
        raise BundleError(location=location, problem=problem, remedy=_EXPORT_AGAIN)
    if sha256 and (actual := _sha256(raw)) != sha256:
        problem = f"{MANIFEST} has SHA-256 {actual}, bundle_sha256 asks for {sha256}"
        raise BundleError(location=location, problem=problem, remedy="bring the bundle that was asked for")
    try:
        return Manifest.parse(json.loads(raw))
    except (ValueError, RecursionError) as error:
        problem = f"{MANIFEST} is not a valid manifest: {str(error)[:300]}"
        raise BundleError(location=location, problem=problem, remedy=_EXPORT_AGAIN) from None


def read(location: str, *, sha256: str = "") -> Bundle:
    """Read a bundle and verify every byte of its graphs.

    Args:
        location: A folder, or a URL that fsspec knows (file, http, s3, gs, memory).
        sha256: Digest that the manifest must have; any if empty.

    Raises:
        BundleError: If a file is missing, or differs from the manifest or the digest; names the file.
    """
    manifest = read_manifest(location, sha256=sha256)
    encoder = _read_graph(location, manifest.encoder)
    decoder = _read_graph(location, manifest.decoder)
    if manifest.version != version_of(encoder, decoder):
        problem = f"{MANIFEST} states version {manifest.version}, its graphs make another"
        raise BundleError(location=location, problem=problem, remedy=_EXPORT_AGAIN)
    return Bundle(manifest, encoder, decoder)


def absolute(location: str) -> str:
    """Return a location that means the same in every process of this machine: a URL, or an absolute path."""
    return location if _is_url(location) else str(Path(location).absolute())


def _is_url(location: str) -> bool:
    return re.match(r"^\w+://", location) is not None


def _read_graph(location: str, file: GraphFile) -> bytes:
    graph = _read(location, file.path, file.size_bytes)
    if len(graph) != file.size_bytes:
        problem = f"{file.path} has {len(graph)} bytes, the manifest states {file.size_bytes}"
    elif (actual := _sha256(graph)) != file.sha256:
        problem = f"{file.path} has SHA-256 {actual}, the manifest states {file.sha256}"
    else:
        return graph
    raise BundleError(
        location=location,
        problem=problem,
        remedy="copy the bundle again; if it stays, " + _EXPORT_AGAIN,
    )


def _read(location: str, name: str, limit_bytes: int) -> bytes:
    """Return a file's bytes, at most one more than the limit so that a larger file shows."""
    try:
        with _open(location, name) as file:
            content: bytes = file.read(limit_bytes + 1)
    except FileNotFoundError as error:
        cause = error.__cause__
        is_absent = isinstance(cause, FileNotFoundError) or getattr(cause, "status", 0) == HTTPStatus.NOT_FOUND
        if cause and not is_absent:  # fsspec says "not found" of a server that is away, too
            raise _unreadable(location, name, cause) from None
        problem = f"there is no {name}"
        raise BundleError(
            location=location, problem=problem, remedy="give the folder that vae-train export wrote"
        ) from None
    except (OSError, ValueError, ImportError) as error:
        raise _unreadable(location, name, error) from None
    return content


def _unreadable(location: str, name: str, error: BaseException) -> BundleError:
    problem = f"{name} cannot be read ({type(error).__name__}: {str(error)[:200]})"
    return BundleError(location=location, problem=problem, remedy="check the address and its permissions")


def _open(location: str, name: str) -> AbstractContextManager[BinaryIO]:
    if not _is_url(location):
        return (Path(location) / name).open("rb")  # not through a URL: names may hold any character
    opened: AbstractContextManager[BinaryIO] = fsspec.open(f"{location.rstrip('/')}/{name}", "rb")
    return opened


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
