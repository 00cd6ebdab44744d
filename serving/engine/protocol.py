"""The seam between what callers ask for and who runs the graphs."""

from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

Rows = NDArray[Any]


class Posterior(NamedTuple):
    """Parameters of q(z | x) for rows of data: `mean` and `log_var`, each (rows, latent_dim), float32."""

    mean: Rows
    log_var: Rows


class Providers(NamedTuple):
    """ONNX Runtime execution providers that were really chosen."""

    encoder: str
    decoder: str


class Engine(Protocol):
    """Runs the two halves of one model on rows. Pure: a caller may repeat any call."""

    @property
    def num_slots(self) -> int:
        """Runs of one graph that it can overlap."""
        ...

    async def encode(self, data: Rows) -> Posterior:
        """Return posteriors of data (rows, *data_shape), uint8 or float32, in pixel units [0, 255]."""
        ...

    async def decode(self, latents: Rows) -> Rows:
        """Return means of p(x | z), (rows, *data_shape), of latents (rows, latent_dim)."""
        ...

    async def check(self) -> Providers:
        """Ask both halves whether they serve the version that is expected.

        Raises:
            EngineUnavailable: If one does not answer, or serves another version.
        """
        ...

    async def close(self) -> None:
        """Let go of what the engine holds."""
        ...
