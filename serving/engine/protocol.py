"""The seam between what callers ask for and who runs the graphs."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Protocol

from numpy.typing import NDArray

from serving.bundle import DecoderOutput, Graph

Rows = NDArray[Any]
GRAPHS: Final[tuple[Graph, Graph]] = ("encoder", "decoder")


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
        """Runs of one graph that one replica can overlap."""
        ...

    def num_replicas(self, graph: Graph) -> int:
        """Return how many replicas of a graph run now, as far as is known; 0 if it sleeps for want of work.

        One at least where the graph should run: who has lost the only one may hope for its replacement.
        """
        ...

    def num_answering(self, graph: Graph) -> int:
        """Return how many replicas of a graph answered last; 0 also if all are lost."""
        ...

    async def encode(self, data: Rows, timeout_s: float) -> Posterior:
        """Return posteriors of data (rows, *data_shape), uint8 or float32, in pixel units [0, 255].

        After `timeout_s` nobody waits for them: an engine may drop them.
        """
        ...

    async def decode(
        self, latents: Rows, timeout_s: float, outputs: Sequence[DecoderOutput] = ("mean",)
    ) -> tuple[Rows, ...]:
        """Return outputs of the decoder, in the order asked for, of latents (rows, latent_dim). Times as above."""
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
