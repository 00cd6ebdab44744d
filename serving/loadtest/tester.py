"""One load test from its plan to its report."""

import asyncio
import contextlib
import os
import platform
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata

from rich.console import Console

from serving import bundle as bundles
from serving.loadtest import limits as own_limits
from serving.loadtest import summary
from serving.loadtest.arrivals import Law, Paced, Recording, Schedule, Segment, complete, recorded
from serving.loadtest.dialects import ProtocolName
from serving.loadtest.endpoint import Endpoint
from serving.loadtest.errors import BadWorkload
from serving.loadtest.fleet import Course, Fleet
from serving.loadtest.generator import ClosedLoop, Prepared, Settings
from serving.loadtest.knee import find_knee
from serving.loadtest.preparation import Checking, Expect, ask_facts, prepare
from serving.loadtest.progress import Display
from serving.loadtest.results import Counts, GeneratorLimits, Knee, LoadReport, Stage
from serving.loadtest.workload import Mode, ModelFacts, Operation, normalised


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a load test does."""

    mode: Mode
    protocol: ProtocolName
    mix: Mapping[Operation, float]

    rates: Sequence[float] = ()
    """Open loop: a stage for each, requests per second. Search of the knee: the first."""

    steps: tuple[Segment, ...] = ()
    """Open loop: stages that follow each other without a pause, instead of `rates`."""

    law: Law = "poisson"
    recording: Recording | None = None
    concurrency: Sequence[int] = ()
    p99_limit_ms: float = 100.0
    seconds: float
    warm_up_s: float
    deadline_s: float
    num_processes: int
    num_channels: int
    seed: int
    bundle: str | None = None
    tolerance: float = 0.0
    is_checked: bool = True
    measures_limits: bool = True
    label: str = ""
    command: str = ""


def run(plan: Plan, endpoint: Endpoint, console: Console) -> LoadReport:
    """Carry out a load test.

    Ctrl-C ends the stage, and the report says so; a second one ends the command.

    Raises:
        LoadTestError: If it cannot begin, or a process of the generator dies.
        BundleError: If there is a bundle and it is not fit.
    """
    started = datetime.now(UTC)
    plan = _with_recorded_operations(plan)
    facts = asyncio.run(ask_facts(endpoint, plan.protocol, timeout_s=plan.deadline_s))
    with Display(console) as display:
        workload = _prepare(plan, endpoint, facts, display)
        settings = Settings(
            protocol=plan.protocol,
            workload=workload,
            deadline_s=plan.deadline_s,
            tolerance=plan.tolerance,
            num_channels=plan.num_channels,
            seed=plan.seed,
        )
        with Fleet(settings, plan.num_processes) as fleet:
            limits = None
            if plan.measures_limits:
                display.tell("measuring the generator against an echo server")
                limits = own_limits.measure_limits(fleet)
            with _interrupts(display) as is_stopped:
                test = _Test(plan, fleet, endpoint, display, workload=workload, is_stopped=is_stopped)
                knee = test.run()
    return _report(plan, test, started=started, facts=facts, endpoint=endpoint, limits=limits, knee=knee)


class _Test:
    """Runs stages, one after the other, and keeps what came of them."""

    def __init__(
        self,
        plan: Plan,
        fleet: Fleet,
        endpoint: Endpoint,
        display: Display,
        *,
        workload: Sequence[Prepared],
        is_stopped: Callable[[], bool],
    ) -> None:
        self._plan, self._fleet, self._display = plan, fleet, display
        self._endpoints = [endpoint] * fleet.num_processes
        self._operations = [prepared.operation for prepared in workload]
        self._shares = tuple(prepared.share for prepared in workload)
        self._is_stopped = is_stopped
        self._num_stages = 0
        self.stages: list[Stage] = []
        self.notes: list[str] = []
        self.warm_up = Counts.total([])

    def run(self) -> Knee | None:
        """Run what the plan says; return the knee if it was looked for."""
        plan = self._plan
        if plan.mode == "closed":
            for concurrency in plan.concurrency:
                self._closed(concurrency)
        elif plan.mode == "replay":
            self._replay()
        elif plan.mode == "knee":
            return find_knee(
                lambda rate: self._open((Segment(rate, plan.seconds),)),
                start_per_s=plan.rates[0],
                p99_limit_ms=plan.p99_limit_ms,
            )
        elif plan.steps:
            self._open(plan.steps)
        else:
            for rate in plan.rates:
                self._open((Segment(rate, plan.seconds),))
        return None

    def _open(self, segments: tuple[Segment, ...]) -> Stage | None:
        """Run segments without a pause, after a warm-up at the first rate; return the last if none was cut."""
        plan, warm_up_s = self._plan, self._plan.warm_up_s
        if self._is_stopped():
            return None
        self._num_stages += 1
        lead = (Segment(segments[0].rate_per_s, warm_up_s),) if warm_up_s else ()
        paced = Paced(
            law=plan.law, segments=lead + segments, shares=self._shares, seed=plan.seed, stage=self._num_stages
        )
        title = ", then ".join(f"{segment.rate_per_s:g}/s" for segment in segments)
        course = self._course(title, paced, paced.seconds)
        begin_s = warm_up_s
        for segment in segments:
            self._add(course, begin_s, segment.seconds, offered_per_s=segment.rate_per_s)
            begin_s += segment.seconds
        return None if course.stopped_s is not None else self.stages[-1]

    def _closed(self, concurrency: int) -> None:
        if self._is_stopped():
            return
        plan = self._plan
        length_s = plan.warm_up_s + plan.seconds
        loop = ClosedLoop(concurrency=concurrency, seconds=length_s)
        course = self._course(f"{concurrency} callers", loop, length_s)
        self._add(course, plan.warm_up_s, plan.seconds, concurrency=concurrency)

    def _replay(self) -> None:
        plan = self._plan
        if plan.recording is None:
            raise BadWorkload("--replay", given="without a recording", expected="a file of arrivals")
        names = [operation.name for operation in self._operations]
        schedule = recorded(plan.recording, names, seed=plan.seed)
        seconds = schedule.seconds - plan.warm_up_s
        if seconds <= 0:
            given = f"{plan.warm_up_s:g} s"
            raise BadWorkload(
                "--warm-up", given=given, expected=f"less than the recording, {schedule.seconds:g} s"
            )
        course = self._course("replay", schedule, schedule.seconds)
        due = schedule.due_s
        self._add(course, plan.warm_up_s, seconds, offered_per_s=float((due >= plan.warm_up_s).sum()) / seconds)

    def _course(self, title: str, plan: Schedule | ClosedLoop, seconds: float) -> Course:
        self._display.begin(title, seconds)
        course = self._fleet.run(
            self._endpoints, plan, is_stopped=self._is_stopped, on_progress=self._display.update
        )
        before = course.records[course.records["due_s"] < self._plan.warm_up_s]
        self.warm_up = Counts.total([self.warm_up, summary.counts(before)])
        if course.stopped_s is not None:
            self.notes.append(f"interrupted {course.stopped_s:.1f} s after the start of {title}")
        return course

    def _add(
        self,
        course: Course,
        begin_s: float,
        seconds: float,
        *,
        offered_per_s: float | None = None,
        concurrency: int | None = None,
    ) -> None:
        """Add a stage, as far as it was run."""
        end_s = begin_s + seconds if course.stopped_s is None else min(begin_s + seconds, course.stopped_s)
        if end_s <= begin_s:
            return
        stage = summary.stage(
            course.records,
            begin_s=begin_s,
            seconds=end_s - begin_s,
            names=[operation.name for operation in self._operations],
            rows=[operation.rows for operation in self._operations],
            offered_per_s=offered_per_s,
            concurrency=concurrency,
            generator_cpu=course.cpu_share(begin_s, end_s),
        )
        self.stages.append(stage)
        self._display.tell(f"  {one_line(stage)}")


def one_line(stage: Stage) -> str:
    """Return what a stage came to."""
    counts, time = stage.counts, stage.response_time
    ends = ", ".join(
        f"{number:,} {name}"
        for name, number in (("refused", counts.refused), ("lost", counts.lost), ("wrong", counts.wrong))
        if number
    )
    latency = f"p50 {time.p50:.2f}, p99 {time.p99:.2f} ms" if time else "no right answer"
    return f"{stage.goodput_per_s:,.1f} right answers/s, {latency}, {ends or 'none refused, lost or wrong'}"


def _with_recorded_operations(plan: Plan) -> Plan:
    """Return the plan with an operation for each arrival of its recording, and the shares that they have there."""
    if plan.recording is None:
        return plan
    given = [
        None if name is None else Operation.parse(name, option="--replay").name
        for name in plan.recording.operations
    ]
    shares = {operation.name: share for operation, share in plan.mix.items()}
    recording = complete(plan.recording._replace(operations=given), shares, seed=plan.seed)
    numbers = Counter(name for name in recording.operations if name is not None)
    mix = normalised({Operation.parse(name): float(number) for name, number in numbers.items()})
    return replace(plan, mix=mix, recording=recording)


def _prepare(plan: Plan, endpoint: Endpoint, facts: ModelFacts, display: Display) -> list[Prepared]:
    display.tell(f"{endpoint.target} serves {facts.name} {facts.digest}; learning the right answers, without load")
    return asyncio.run(
        prepare(
            endpoint,
            plan.protocol,
            plan.mix,
            facts,
            seed=plan.seed,
            timeout_s=plan.deadline_s,
            checking=Checking(is_on=plan.is_checked, expect=_expect(plan, facts), tolerance=plan.tolerance),
        )
    )


def _expect(plan: Plan, facts: ModelFacts) -> Expect | None:
    """Return who knows the right answers: the bundle's graphs, if there is a bundle."""
    if plan.bundle is None or not plan.is_checked:
        return None
    from serving.loadtest.oracle import Oracle  # noqa: PLC0415 - only who has a bundle needs ONNX Runtime

    bundle = bundles.read(plan.bundle)
    if facts.digest and facts.digest != bundle.manifest.version:
        expected = f"the bundle that is served, version {facts.digest}"
        raise BadWorkload(
            "--bundle", given=f"{plan.bundle} (version {bundle.manifest.version})", expected=expected
        )
    return Oracle(bundle).answer


@contextlib.contextmanager
def _interrupts(display: Display) -> Iterator[Callable[[], bool]]:
    """Count Ctrl-C instead of stopping at the first; yield whether there was one."""
    asked = False

    def ask(_number: int, _frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        display.tell("ending the stage; Ctrl-C again leaves without a report")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report(
    plan: Plan,
    test: _Test,
    *,
    started: datetime,
    facts: ModelFacts,
    endpoint: Endpoint,
    limits: GeneratorLimits | None,
    knee: Knee | None,
) -> LoadReport:
    reasons = own_limits.judge(limits, test.stages)
    if limits is not None:
        limits = limits.model_copy(update={"is_limiting": bool(reasons), "reason": "; ".join(reasons)})
    notes = [*test.notes, *_notes(plan, test)]
    if limits is None and reasons:
        notes.append(f"the generator may be the limit: {'; '.join(reasons)}")
    return LoadReport(
        label=plan.label or f"{facts.name} {started:%Y-%m-%d %H:%M}",
        command=plan.command,
        target=endpoint.target,
        protocol=plan.protocol,
        mode=plan.mode,
        model=f"{facts.name} {facts.digest}".strip(),
        mix={operation.name: share for operation, share in plan.mix.items()},
        deadline_s=plan.deadline_s,
        seed=plan.seed,
        started_at=f"{started:%Y-%m-%dT%H:%M:%SZ}",
        machine=_machine(),
        checks=_checks(plan),
        stages=test.stages,
        counts=Counts.total(stage.counts for stage in test.stages),
        limits=limits,
        knee=knee,
        notes=notes,
    )


def _notes(plan: Plan, test: _Test) -> list[str]:
    notes = []
    lost, wrong = test.warm_up.lost, test.warm_up.wrong
    if lost or wrong:
        notes.append(f"during warm-up, which is not in the figures, {lost} lost and {wrong} wrong")
    if not plan.is_checked:
        notes.append("contents were not checked: right means answered in time")
    if not plan.measures_limits:
        notes.append("the generator's own limit was not measured")
    return notes


def _checks(plan: Plan) -> str:
    if not plan.is_checked:
        return "none: only statuses and times"
    how = "bit by bit" if not plan.tolerance else f"within {plan.tolerance:g} + {plan.tolerance:g} |a|"
    if plan.bundle is None:
        return f"each answer equals, {how}, the answer of the same seeded request made alone before the load"
    return f"each answer equals, {how}, what the bundle's own graphs give on this machine's processor"


def _machine() -> dict[str, str]:
    return {
        "processors": str(os.cpu_count()),
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "grpcio": metadata.version("grpcio"),
    }
