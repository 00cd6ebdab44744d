"""The Ray engine without a cluster: handles that behave as told. The real ones are in tests/end_to_end."""

import asyncio
import math
import time
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import DeploymentUnavailableError

from serving.bundle import Bundle
from serving.config import ServingConfig
from serving.engine.ray_engine import RayEngine, ReplicaReport
from serving.errors import DeadlineExceeded, EngineUnavailable
from serving.runtime import LoadReport
from serving.spans import RunTrace, new_context, running

ROWS = np.ones((3, 2), np.float32)


class Answers:
    """What all replicas answer, as Serve hands it over."""

    def __init__(self, answers: list[object]) -> None:
        self._answers = answers

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[object]:
        """Return an answer or an error of each; none at all is an error, and so is one that is late."""
        assert return_exceptions
        if not self._answers:
            raise NoReplica
        if "hang" in self._answers:
            await asyncio.sleep(min(timeout_s, 0.01))
            raise TimeoutError
        return self._answers


class NoReplica(DeploymentUnavailableError):
    """What Serve raises where nothing runs."""

    def __init__(self) -> None:
        pass


class Handle:
    """A deployment whose calls end with the outcomes it is given, one after the other."""

    def __init__(self, *outcomes: object, replicas: list[object] | None = None) -> None:
        self.outcomes = list(outcomes)
        self.replicas = list(outcomes) if replicas is None else replicas
        self.num_calls = 0
        self.arguments: list[tuple[Any, ...]] = []
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

    def broadcast(self, method: str) -> Answers:
        """Ask every replica."""
        assert method == "describe"
        return Answers(self.replicas)

    async def remote(self, *arguments: object) -> object:
        """End as told; the last outcome repeats."""
        self.num_calls += 1
        self.arguments.append(arguments)
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
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
    np.testing.assert_array_equal((await engine_of(small, decoder).decode(ROWS, 60.0))[0], ROWS)
    assert decoder.num_calls == 3


async def test_a_traced_run_tells_its_replica_and_hears_what_was_lost(small: Bundle) -> None:
    """The context goes along by Serve's handle, and an attempt that was lost is an event of the run."""
    decoder = Handle(ActorDiedError(), (small.manifest.version, (ROWS,)))
    engine, run = engine_of(small, decoder), RunTrace(new_context())
    with running(run):
        await engine.decode(ROWS, 60.0)
    await engine.decode(ROWS, 60.0)
    assert [arguments[4:] for arguments in decoder.arguments] == [(run.context.token,), (run.context.token,), ()]
    (event,) = run.events
    assert (event.name, event.attributes["attempt"]) == ("replica lost", 1)


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
    np.testing.assert_array_equal((await engine.decode(ROWS, 60.0))[0], ROWS)


async def test_the_deadline_of_the_rows_ends_all_attempts(small: Bundle) -> None:
    """When nobody waits any more, a stuck replica is not followed by another: the caller's time is over."""
    decoder = Handle("hang")
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="the deadline passed"):
        await engine_of(small, decoder).decode(ROWS, 0.1)
    assert 0.1 <= time.monotonic() - started < 2
    assert decoder.num_calls == 1


async def test_attempts_share_the_time_that_is_left(small: Bundle) -> None:
    """Each attempt is told the seconds that are left, fewer each time, and none is begun after the end."""
    decoder = Handle("hang")
    engine = engine_of(small, decoder, "decoder.attempt_timeout_s=0.1", "decoder.max_attempts=10")
    with pytest.raises(DeadlineExceeded, match="the deadline passed"):
        await engine.decode(ROWS, 0.25, ("mean", "logits"))
    left = [arguments[2] for arguments in decoder.arguments]
    assert left == sorted(left, reverse=True)
    assert 0 < left[-1] < left[0] <= 0.25
    assert 2 <= decoder.num_calls <= 3
    assert all(arguments[1] == ("mean", "logits") for arguments in decoder.arguments)


async def test_rows_that_are_late_already_cost_no_call(small: Bundle) -> None:
    """Rows without any time left are not sent to a replica."""
    decoder = Handle((small.manifest.version, (ROWS,)))
    for late_s in (0.0, -5.0):
        with pytest.raises(DeadlineExceeded, match="the deadline passed"):
            await engine_of(small, decoder).decode(ROWS, late_s)
    assert decoder.num_calls == 0


async def test_a_replica_that_drops_late_rows_is_not_asked_twice(small: Bundle) -> None:
    """What expired in the replica's own queue has expired for the caller, without what Ray says around it."""
    decoder = Handle(DeadlineExceeded())
    with pytest.raises(DeadlineExceeded, match="the deadline passed") as caught:
        await engine_of(small, decoder).decode(ROWS, 60.0)
    assert decoder.num_calls == 1
    assert caught.value.__suppress_context__


async def test_rows_without_a_deadline_are_run(small: Bundle) -> None:
    """No end of time is a time, too."""
    decoder = Handle((small.manifest.version, (ROWS,)))
    np.testing.assert_array_equal((await engine_of(small, decoder).decode(ROWS, math.inf))[0], ROWS)


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
    says = ReplicaReport(report, None)
    good = RayEngine(Handle(says), Handle(says), small.manifest, config)  # type: ignore[arg-type]  # they behave
    assert await good.check() == ("CPUExecutionProvider", "CPUExecutionProvider")
    stale = Handle(ReplicaReport(report._replace(version="000000000000"), None))
    mixed = RayEngine(Handle(says), stale, small.manifest, config)  # type: ignore[arg-type]  # they behave
    with pytest.raises(EngineUnavailable, match="decoder"):
        await mixed.check()


async def test_calls_go_by_value(small: Bundle) -> None:
    """By reference a cancelled call would run to its end, and each would cost twice as much."""
    decoder = Handle("unused")
    engine_of(small, decoder)
    assert decoder.chosen["_by_reference"] is False


def reports(small: Bundle, number: int) -> list[object]:
    """Return what healthy replicas say of themselves."""
    report = LoadReport(version=small.manifest.version, provider="CPUExecutionProvider", threads=1, load_s=0.1)
    return [ReplicaReport(report, None)] * number


def watched(small: Bundle, decoder: Handle, *overrides: str) -> RayEngine:
    """Return an engine with one healthy encoder, and a decoder that behaves as told."""
    encoder = Handle("unused", replicas=reports(small, 1))
    return RayEngine(encoder, decoder, small.manifest, ServingConfig().override(overrides))  # type: ignore[arg-type]  # they behave


async def test_a_check_counts_the_replicas_that_answer(small: Bundle) -> None:
    """Of each graph apart; those that have just died do not count, and do not make it ill."""
    decoder = Handle("unused", replicas=[*reports(small, 3), ActorDiedError()])
    engine = watched(small, decoder)
    assert engine.num_replicas("decoder") == 1, "until it is known better"
    await engine.check()
    assert engine.num_replicas("decoder") == 3
    assert engine.num_replicas("encoder") == 1
    decoder.replicas = reports(small, 2)
    await engine.check()
    assert engine.num_replicas("decoder") == 2


async def test_a_replica_that_hangs_does_not_make_the_others_ill(small: Bundle) -> None:
    """Not all answer in time: then one that answers is enough, and the number stays."""
    decoder = Handle(*reports(small, 1), replicas=reports(small, 2))
    engine = watched(small, decoder)
    await engine.check()
    decoder.replicas = [*reports(small, 1), "hang"]
    assert (await engine.check()).decoder == "CPUExecutionProvider"
    assert engine.num_replicas("decoder") == 2


async def test_without_replicas_a_graph_is_ill_unless_it_may_sleep(small: Bundle) -> None:
    """None where one must be is an outage; the batcher still counts on one, so that what waits can stall."""
    engine = watched(small, Handle("unused", replicas=[]))
    with pytest.raises(EngineUnavailable, match="decoder"):
        await engine.check()
    assert engine.num_replicas("decoder") == 1
    assert engine.num_answering("decoder") == 0  # what operators are shown


async def test_a_graph_that_sleeps_is_neither_ill_nor_woken(small: Bundle) -> None:
    """Health and description go on from what it said when it was awake."""
    decoder = Handle("unused", replicas=reports(small, 1))
    engine = watched(small, decoder, "decoder.min_replicas=0")
    await engine.check()
    decoder.replicas = []
    for _ in range(3):
        assert (await engine.check()).decoder == "CPUExecutionProvider"
    assert engine.num_replicas("decoder") == 0
    assert decoder.num_calls == 0


async def test_a_gateway_that_never_saw_a_graph_wakes_it_once(small: Bundle) -> None:
    """A new gateway does not serve what nobody has seen to run."""
    decoder = Handle(*reports(small, 1), replicas=[])
    engine = watched(small, decoder, "decoder.min_replicas=0")
    await engine.check()
    await engine.check()
    assert decoder.num_calls == 1


async def test_the_first_call_may_take_all_its_time_to_wake_a_graph(small: Bundle) -> None:
    """A start is longer than an attempt: attempts would be spent before the replica is up."""
    decoder = Handle("hang", replicas=reports(small, 1))
    limits = ("decoder.min_replicas=0", "decoder.attempt_timeout_s=0.05", "decoder.max_attempts=2")
    engine = watched(small, decoder, *limits)
    await engine.check()
    with pytest.raises(EngineUnavailable):
        await engine.decode(ROWS, 0.3)
    decoder.replicas, decoder.num_calls = reports(small, 1), 0
    await engine.check()
    decoder.replicas = []
    await engine.check()
    with pytest.raises(DeadlineExceeded):
        await engine.decode(ROWS, 0.3)
    assert decoder.num_calls == 1


async def test_a_graph_that_does_not_wake_is_ill_until_it_answers(small: Bundle) -> None:
    """Asleep is well only as long as it wakes: after a failed run health asks it, which is a try as well."""
    decoder = Handle(ActorDiedError(), replicas=reports(small, 1))
    engine = watched(small, decoder, "decoder.min_replicas=0")
    await engine.check()
    decoder.replicas = []
    await engine.check()
    with pytest.raises(EngineUnavailable):
        await engine.decode(ROWS, 60.0)
    with pytest.raises(EngineUnavailable):
        await engine.check()
    decoder.outcomes = reports(small, 1)
    await engine.check()
    decoder.outcomes = [ActorDiedError()]
    await engine.check()  # asleep again, and well


async def test_runs_bring_the_replicas_part_of_what_waits(small: Bundle) -> None:
    """So the parts of all replicas add up to what waits, whichever of them Serve chooses."""
    decoder = Handle((small.manifest.version, (ROWS,)), replicas=reports(small, 4))
    engine = watched(small, decoder)
    engine.count_waiting = lambda graph: {"encoder": 7, "decoder": 100}[graph]
    await engine.check()
    await engine.decode(ROWS, 60.0)
    name, part = decoder.arguments[-1][3]
    assert part == 100 / 4
    other = watched(small, decoder)
    await other.decode(ROWS, 60.0)
    assert decoder.arguments[-1][3][0] != name, "gateways are told apart"
