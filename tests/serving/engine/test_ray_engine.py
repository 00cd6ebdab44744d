"""The Ray engine without a cluster: handles that behave as told. The real ones are in tests/end_to_end."""

import asyncio
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from serving.bundle import Bundle
from serving.config import ServingConfig
from serving.engine.ray_engine import RayEngine
from serving.errors import EngineUnavailable
from serving.runtime import LoadReport

ROWS = np.ones((3, 2), np.float32)


class Handle:
    """A deployment whose calls end with the outcomes it is given, one after the other."""

    def __init__(self, *outcomes: object) -> None:
        self._outcomes = list(outcomes)
        self.num_calls = 0
        self.chosen: dict[str, Any] = {}

    def options(self, **chosen: Any) -> "Handle":  # noqa: ANN401 - whatever Serve takes
        """Remember what was asked for."""
        self.chosen = chosen
        return self

    @property
    def run(self) -> "Handle":
        """The method that runs rows."""
        return self

    @property
    def describe(self) -> "Handle":
        """The method that says what is loaded."""
        return self

    async def remote(self, *_: object) -> object:
        """End as told; the last outcome repeats."""
        self.num_calls += 1
        outcome = self._outcomes.pop(0) if len(self._outcomes) > 1 else self._outcomes[0]
        if outcome == "hang":
            await asyncio.sleep(60)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def engine_of(small: Bundle, decoder: Handle, *overrides: str) -> RayEngine:
    """Return an engine on a decoder that behaves as told."""
    config = ServingConfig().override(overrides)
    return RayEngine(Handle("unused"), decoder, small.manifest, config)  # type: ignore[arg-type]  # it behaves


async def test_a_lost_replica_costs_a_second_try(small: Bundle) -> None:
    """A run is pure, so it is repeated when its replica dies or cannot be reached."""
    decoder = Handle(ActorDiedError(), ActorUnavailableError("away", b"0" * 16), (small.manifest.version, (ROWS,)))
    np.testing.assert_array_equal(await engine_of(small, decoder).decode(ROWS, 60.0), ROWS)
    assert decoder.num_calls == 3


async def test_attempts_are_bounded_and_the_cause_is_kept_for_the_log(small: Bundle) -> None:
    """After the last attempt the caller hears that the graph is not available, the operator why."""
    decoder = Handle(ActorDiedError())
    with pytest.raises(EngineUnavailable, match="the decoder is not available now") as caught:
        await engine_of(small, decoder, "decoder.max_attempts=2").decode(ROWS, 60.0)
    assert decoder.num_calls == 2
    assert "ActorDiedError" in caught.value.detail
    assert "ActorDiedError" not in str(caught.value)


async def test_an_attempt_that_hangs_is_given_up(small: Bundle) -> None:
    """A stuck replica takes no caller with it: the attempt ends, and another replica is asked."""
    decoder = Handle("hang", (small.manifest.version, (ROWS,)))
    engine = engine_of(small, decoder, "decoder.attempt_timeout_s=0.05")
    np.testing.assert_array_equal(await engine.decode(ROWS, 60.0), ROWS)


async def test_a_bug_in_the_replica_is_not_repeated(small: Bundle) -> None:
    """What the rows themselves cause comes back at once: the batcher runs requests apart."""
    decoder = Handle(ValueError("these rows"))
    with pytest.raises(ValueError, match="these rows"):
        await engine_of(small, decoder).decode(ROWS, 60.0)
    assert decoder.num_calls == 1


async def test_rows_of_another_version_are_refused(small: Bundle) -> None:
    """Encoder and decoder of different models never answer together."""
    with pytest.raises(EngineUnavailable) as caught:
        await engine_of(small, Handle(("000000000000", (ROWS,)))).decode(ROWS, 60.0)
    assert "000000000000" in caught.value.detail


async def test_check_tells_the_providers_or_who_is_missing(small: Bundle) -> None:
    """Health asks both graphs which version they serve, and where."""
    report = LoadReport(version=small.manifest.version, provider="CPUExecutionProvider", threads=1, load_s=0.1)
    config = ServingConfig()
    good = RayEngine(Handle(report), Handle(report), small.manifest, config)  # type: ignore[arg-type]  # they behave
    assert await good.check() == ("CPUExecutionProvider", "CPUExecutionProvider")
    stale = Handle(report._replace(version="000000000000"))
    mixed = RayEngine(Handle(report), stale, small.manifest, config)  # type: ignore[arg-type]  # they behave
    with pytest.raises(EngineUnavailable, match="decoder"):
        await mixed.check()


async def test_calls_go_by_value(small: Bundle) -> None:
    """By reference a cancelled call would run to its end, and each would cost twice as much."""
    decoder = Handle("unused")
    engine_of(small, decoder)
    assert decoder.chosen["_by_reference"] is False
