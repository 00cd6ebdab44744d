"""Right answers, known without the service: the bundle's own graphs on this processor."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from serving import likelihoods, noise
from serving.bundle import Bundle
from serving.gateway.operations import interpolate_latents
from serving.loadtest.dialects import Values
from serving.loadtest.workload import Contents, Operation
from serving.runtime import GraphRuntime

Float32 = NDArray[np.float32]

_PIXEL_MAX: Final = np.float32(255)


class Oracle:
    """Computes what each operation must answer.

    Args:
        bundle: A verified bundle.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._manifest = bundle.manifest
        self._encoder = GraphRuntime(bundle, "encoder", device="cpu", threads=1)
        self._decoder = GraphRuntime(bundle, "decoder", device="cpu", threads=1)

    def answer(self, operation: Operation, contents: Contents) -> Values:
        """Return the arrays of the right answer, by the names that both protocols give them."""
        method = operation.method
        if method == "encode":
            mean, log_var = self._encode(contents)
            return {"mean": mean, "log_var": log_var}
        if method == "score":
            return self._score(contents)
        if method == "interpolate":
            start, end = contents.latents[:1], contents.latents[1:]
            path = interpolate_latents(start, end, operation.rows, "linear")
            means = self._decode(path.reshape(operation.rows, -1))
            return {"observations": means[None]}
        if method == "sample":
            dim = self._manifest.latent_dim
            latents = noise.normal(contents.seed, operation.rows, dim, first_row=contents.first_row)
            return {"samples": self._decode(latents)}
        latents = contents.latents if method == "decode" else self._encode(contents)[0]
        return {"reconstruction": self._decode(latents)}

    def _encode(self, contents: Contents) -> tuple[Float32, Float32]:
        mean, log_var = self._encoder.run(contents.data, ["mean", "log_var"])
        return mean, log_var

    def _decode(self, latents: Float32) -> Float32:
        return self._decoder.run(latents, ["mean"])[0]

    def _score(self, contents: Contents) -> Values:
        """Return the evidence lower bound with one draw from each posterior, and its parts."""
        mean, log_var = self._encode(contents)
        num_rows, dim = mean.shape
        standard = noise.normal(
            contents.seed, num_rows, dim, first_row=contents.first_row, stream=noise.Stream.POSTERIOR
        )
        latents = mean + np.exp(np.float32(0.5) * log_var) * standard
        likelihood = likelihoods.of(self._manifest)
        parameters = tuple(self._decoder.run(latents, likelihood.parameters))
        unit = contents.data.reshape(num_rows, 1, -1).astype(np.float32) / _PIXEL_MAX
        log_likelihood = likelihood.log_prob(unit, parameters).mean(axis=1)
        wide, wide_log_var = mean.astype(np.float64), log_var.astype(np.float64)
        kl = 0.5 * (wide**2 + np.exp(wide_log_var) - 1.0 - wide_log_var).sum(axis=1)
        return {
            "score": (log_likelihood - kl).astype(np.float32),
            "log_likelihood": log_likelihood.astype(np.float32),
            "kl": kl.astype(np.float32),
        }
