"""One graph on ONNX Runtime: where it runs, known answers at start; arrays in and out."""

import time
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from serving.bundle import Bundle, Graph, KnownAnswer, Manifest, golden_data, golden_latents, known_answer
from serving.config import AcceleratorConfig, ServingConfig
from serving.device_runs import CudaPageLock, DeviceRuns, Float32, Memory, Shapes, run_options
from serving.errors import BundleError, DeadlineExceeded, ProviderUnavailable
from serving.likelihoods import row_shapes
from serving.sessions import CPU, TOLERANCES, Device, GraphInput, open_session, providers

Rows = NDArray[Any]

_WARM_UP_ROWS: Final = (1, 64)


class LoadReport(NamedTuple):
    """What loading a graph took and chose."""

    version: str
    provider: str
    threads: int
    load_s: float
    precision: str = "fp32"
    buckets: tuple[int, ...] = ()
    """Sizes of batches that run, rows; none where every size does."""

    num_lanes: int = 0
    """Runs with buffers of their own; none where runs bring their memory."""

    device_bytes: int = 0
    """Size of the buffers on the device, bytes."""

    is_page_locked: bool = False
    """Whether rows go to the device out of page-locked memory."""

    nodes: tuple[tuple[str, int], ...] = ()
    """How many nodes of the graph each provider runs."""


class GraphRuntime:
    """A verified graph of a bundle, ready to run rows.

    On a CPU a run takes the caller's rows as they are: for 1 to 4,096 rows of an MLP, buffers that stay bound gave
    0.79 to 0.97 of the speed of plain runs, and bound outputs alone 0.89 to 1.04, in processor time of alternating
    runs. On a GPU rows go through buffers on the device, see `device_runs`.

    Args:
        bundle: A bundle whose bytes are verified.
        graph: Which of its graphs to load.
        device: Where it must run.
        threads: Threads of the session. ONNX Runtime would take every core of the host unless told.
        accelerator: How it runs on a GPU, with buckets; by default as `ServingConfig` has it.

    Raises:
        ProviderUnavailable: If the device cannot be used; ONNX Runtime alone would fall back silently.
        BundleError: If the graph cannot be loaded, or does not reproduce its known answers here.
    """

    def __init__(
        self,
        bundle: Bundle,
        graph: Graph,
        *,
        device: Device,
        threads: int,
        accelerator: AcceleratorConfig | None = None,
    ) -> None:
        started = time.monotonic()
        manifest = bundle.manifest
        accelerator = accelerator or ServingConfig().bucketed_accelerator()
        self._precision = accelerator.precision if device == "cuda" else "fp32"
        self._opener = _Opener(bundle, graph, device=device, threads=threads, accelerator=accelerator)
        self._session = self._opener.open()
        self._device_runs: DeviceRuns | None = None
        file = manifest.encoder if graph == "encoder" else manifest.decoder
        self._input, self._outputs = file.inputs[0], file.outputs
        golden = golden_data(manifest.data_shape) if graph == "encoder" else golden_latents(manifest.latent_dim)
        self._golden = golden
        if graph == "decoder":
            self._check_likelihood(manifest)
        self._verify(golden, [answer for answer in manifest.golden if answer.graph == graph], manifest.name)
        if device == "cuda":
            self._device_runs = self._bind(accelerator, manifest.name)
        else:
            for rows in _WARM_UP_ROWS:
                self.run(np.repeat(golden[:1], rows, axis=0), self._outputs)
        self.report = self._report(manifest.version, threads, time.monotonic() - started)

    def run(self, rows: Rows, outputs: Sequence[str]) -> list[Float32]:
        """Run the graph on rows; uint8 is widened to float32, exactly.

        Args:
            rows: Shape (rows, *row_shape), float32 or uint8.
            outputs: Names of the outputs to compute.

        Returns:
            One array per name; the first dimension counts rows.
        """
        if self._device_runs is not None:
            return self._device_runs.run(rows, outputs)
        feed = {self._input: np.ascontiguousarray(rows, np.float32)}
        result: list[Float32] = self._session.run(outputs, feed, self._opener.run_options)
        return result

    def run_until(self, expires_at: float, rows: Rows, outputs: Sequence[str]) -> list[Float32]:
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
            if not self._is_known(expected, values):
                _refuse(name, f"the {expected.graph}'s {expected.output} is not its known answer here")

    def _is_known(self, expected: KnownAnswer, values: Float32) -> bool:
        actual, tolerance = known_answer(expected.graph, expected.output, values), TOLERANCES[self._precision]
        # The total accumulates the rounding of every value: its tolerance grows with their number.
        return (
            len(actual.first) == len(expected.first)
            and np.allclose(actual.first, expected.first, rtol=tolerance, atol=tolerance)
            and bool(np.isclose(actual.total, expected.total, rtol=tolerance, atol=tolerance * values.size))
        )

    def _bind(self, accelerator: AcceleratorConfig, name: str) -> DeviceRuns:
        """Return runs on buffers of the device, each bucket warm and checked against a run without them."""
        plain = self.run(self._golden, self._outputs)
        row_shapes = {output: values.shape[1:] for output, values in zip(self._outputs, plain, strict=True)}
        memory: Memory = "cpu" if self._session.get_providers()[0] == CPU else "cuda"
        opened = [self._session]  # the first lane takes it

        runs = DeviceRuns(
            lambda: opened.pop() if opened else self._opener.open(),
            Shapes(self._input, self._golden.shape[1:], row_shapes),
            memory=memory,
            buckets=accelerator.buckets,
            num_lanes=accelerator.num_lanes,
            has_graphs=accelerator.cuda_graphs,
            page_lock=CudaPageLock() if memory == "cuda" else None,
        )

        def check(computed: list[Float32], num_rows: int) -> None:
            tolerance = TOLERANCES[self._precision]
            for output, values, expected in zip(self._outputs, computed, plain, strict=True):
                wanted = np.resize(expected, (num_rows, *expected.shape[1:]))
                if not np.allclose(values, wanted, rtol=tolerance, atol=tolerance):
                    _refuse(name, f"{output} of {num_rows} rows in a batch is not what it is for four")

        runs.warm_up(self._golden, check, self._outputs)
        return runs

    def _report(self, version: str, threads: int, load_s: float) -> LoadReport:
        chosen = LoadReport(
            version=version,
            provider=self._session.get_providers()[0],
            threads=threads,
            load_s=load_s,
            precision=self._precision,
            nodes=tuple(self._opener.nodes.items()),
        )
        if self._device_runs is None:
            return chosen
        return chosen._replace(
            buckets=self._device_runs.buckets,
            num_lanes=self._device_runs.num_lanes,
            device_bytes=self._device_runs.device_bytes,
            is_page_locked=self._device_runs.is_page_locked,
        )


class _Opener:
    """Opens sessions of one graph, the same each time."""

    def __init__(
        self, bundle: Bundle, graph: Graph, *, device: Device, threads: int, accelerator: AcceleratorConfig
    ) -> None:
        manifest = bundle.manifest
        self._name, self._graph, self._threads = manifest.name, graph, threads
        self._content = bundle.encoder if graph == "encoder" else bundle.decoder
        row_shape = manifest.data_shape if graph == "encoder" else (manifest.latent_dim,)
        file = manifest.encoder if graph == "encoder" else manifest.decoder
        self._providers = providers(
            device,
            accelerator,
            GraphInput(file.inputs[0], row_shape),
            identity=f"{graph}-{file.sha256[:16]}",
        )
        self.nodes: dict[str, int] = {}
        """How many nodes each provider runs, once a session is open."""
        self.run_options = None if device == "cpu" else run_options(None)
        """Options of a run outside of the buffers: no CUDA graph may be captured of it."""

    def open(self) -> Any:  # noqa: ANN401 - onnxruntime has no types
        try:
            session, self.nodes = open_session(self._content, self._providers, threads=self._threads)
        except ProviderUnavailable:
            raise
        except Exception as error:  # noqa: BLE001 - whatever ONNX Runtime raises, it is of no use
            _refuse(self._name, f"ONNX Runtime cannot load the {self._graph} ({type(error).__name__})")
        return session


def _refuse(name: str, problem: str) -> NoReturn:
    raise BundleError(location=name, problem=problem, remedy="export it again with vae-train export")
