"""One ONNX Runtime session: provider, threads, known answers at start; arrays in and out."""

import time
from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple, NoReturn

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from serving.bundle import Bundle, KnownAnswer, Manifest, golden_data, golden_latents, known_answer
from serving.errors import BundleError, DeadlineExceeded, ProviderUnavailable
from serving.likelihoods import row_shapes

Rows = NDArray[Any]
Graph = Literal["encoder", "decoder"]

GOLDEN_TOLERANCE: Final = 1e-3
"""Largest difference from a known answer, absolute and relative. Rounding differs between kinds of processor
(TF32 on CUDA: 10 bits of mantissa, 5e-4); swapped or damaged weights differ by far more."""

_PROVIDERS: Final = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_ERROR: Final = 3
_FATAL: Final = 4
_WARM_UP_ROWS: Final = (1, 64)


class LoadReport(NamedTuple):
    """What loading a graph took and chose."""

    version: str
    provider: str
    threads: int
    load_s: float


class GraphRuntime:
    """A verified graph of a bundle, ready to run rows.

    Args:
        bundle: A bundle whose bytes are verified.
        graph: Which of its graphs to load.
        device: Where it must run.
        threads: Threads of the session. ONNX Runtime would take every core of the host unless told.

    Raises:
        ProviderUnavailable: If the device cannot be used; ONNX Runtime alone would fall back silently.
        BundleError: If the graph cannot be loaded, or does not reproduce its known answers here.
    """

    def __init__(self, bundle: Bundle, graph: Graph, *, device: Literal["cpu", "cuda"], threads: int) -> None:
        started = time.monotonic()
        manifest = bundle.manifest
        self._session = _session(bundle, graph, device=device, threads=threads)
        file = manifest.encoder if graph == "encoder" else manifest.decoder
        self._input, self._outputs = file.inputs[0], file.outputs
        golden = golden_data(manifest.data_shape) if graph == "encoder" else golden_latents(manifest.latent_dim)
        self._golden = golden
        if graph == "decoder":
            self._check_likelihood(manifest)
        self._verify(golden, [answer for answer in manifest.golden if answer.graph == graph], manifest.name)
        for rows in _WARM_UP_ROWS:
            self.run(np.repeat(golden[:1], rows, axis=0), self._outputs)
        self.report = LoadReport(
            version=manifest.version,
            provider=self._session.get_providers()[0],
            threads=threads,
            load_s=time.monotonic() - started,
        )

    def run(self, rows: Rows, outputs: Sequence[str]) -> list[NDArray[np.float32]]:
        """Run the graph on rows; uint8 is widened to float32, exactly.

        Args:
            rows: Shape (rows, *row_shape), float32 or uint8.
            outputs: Names of the outputs to compute.

        Returns:
            One array per name; the first dimension counts rows.
        """
        result: list[NDArray[np.float32]] = self._session.run(
            outputs, {self._input: np.ascontiguousarray(rows, np.float32)}
        )
        return result

    def run_until(self, expires_at: float, rows: Rows, outputs: Sequence[str]) -> list[NDArray[np.float32]]:
        """Run the graph as `run` does, unless its turn came so late that nobody waits any more.

        Raises:
            DeadlineExceeded: If it is past `expires_at`, monotonic time.
        """
        if time.monotonic() > expires_at:
            raise DeadlineExceeded
        return self.run(rows, outputs)

    def is_batch_independent(self) -> bool:
        """Return whether each golden row gives the same bits alone and in a batch.

        The service promises it; per-tensor quantisation, for one, breaks it.
        """
        together = self.run(self._golden, self._outputs)
        alone = [self.run(row[None], self._outputs) for row in self._golden]
        return all(
            np.array_equal(values, np.concatenate([outputs[index] for outputs in alone]))
            for index, values in enumerate(together)
        )

    def _check_likelihood(self, manifest: Manifest) -> None:
        """Refuse a decoder that lacks an output of its likelihood, or gives one in another shape."""
        shapes = row_shapes(manifest)
        if missing := sorted(shapes.keys() - set(self._outputs)):
            _refuse(manifest.name, f"a {manifest.likelihood} likelihood needs the decoder's {', '.join(missing)}")
        try:
            values = dict(zip(shapes, self.run(self._golden, list(shapes)), strict=True))
        except Exception:  # noqa: BLE001 - `_verify` says what is wrong with a graph that does not run
            return
        for name, allowed in shapes.items():
            if (actual := values[name].shape[1:]) not in allowed:
                problem = f"the decoder's {name} has rows of shape {actual}, expected {allowed[0]}"
                _refuse(manifest.name, f"{problem} for a {manifest.likelihood} likelihood")

    def _verify(self, golden: Rows, answers: Sequence[KnownAnswer], name: str) -> None:
        names = [answer.output for answer in answers]
        if sorted(names) != sorted(self._outputs):
            _refuse(name, f"known answers for {names}, outputs {list(self._outputs)}")
        try:
            computed = self.run(golden, names)
        except Exception as error:  # noqa: BLE001 - whatever ONNX Runtime raises, the graph does not fit its manifest
            _refuse(name, f"its graph does not take the golden rows ({type(error).__name__})")
        for expected, values in zip(answers, computed, strict=True):
            actual = known_answer(expected.graph, expected.output, values)
            # The total accumulates the rounding of every value: its tolerance grows with their number.
            close = (
                len(actual.first) == len(expected.first)
                and np.allclose(actual.first, expected.first, rtol=GOLDEN_TOLERANCE, atol=GOLDEN_TOLERANCE)
                and np.isclose(
                    actual.total, expected.total, rtol=GOLDEN_TOLERANCE, atol=GOLDEN_TOLERANCE * values.size
                )
            )
            if not close:
                _refuse(name, f"the {expected.graph}'s {expected.output} is not its known answer here")


def _session(
    bundle: Bundle, graph: Graph, *, device: Literal["cpu", "cuda"], threads: int
) -> ort.InferenceSession:
    wanted = _PROVIDERS[device]
    ort.set_default_logger_severity(_FATAL)  # what ONNX Runtime would print is raised by us, once
    if wanted not in ort.get_available_providers():
        raise ProviderUnavailable(asked=wanted, actual="none of that name")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL if device == "cuda" else _ERROR
    # Several sessions share the cores of a machine: a spinning thread would take them from its neighbours.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    content = bundle.encoder if graph == "encoder" else bundle.decoder
    try:
        session = ort.InferenceSession(content, options, providers=[wanted])
    except Exception as error:
        if device == "cuda":
            raise ProviderUnavailable(asked=wanted, actual="none (it failed to start)") from error
        _refuse(bundle.manifest.name, f"ONNX Runtime cannot load the {graph} ({type(error).__name__})")
    if (actual := session.get_providers()[0]) != wanted:
        raise ProviderUnavailable(asked=wanted, actual=actual)
    return session


def _refuse(name: str, problem: str) -> NoReturn:
    raise BundleError(location=name, problem=problem, remedy="export it again with vae-train export")
