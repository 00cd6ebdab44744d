"""Who is let in: bounded, fair between clients, at their rates, with honest hints, in bounded memory."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.config import AdmissionConfig
from serving.errors import QueueFull, RateLimited
from serving.gateway.admission import Admission


class Clock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    """Return a clock that obeys."""
    return Clock()


Make = Callable[..., Admission]


@pytest.fixture
def make(clock: Clock) -> Make:
    """Return a maker of admissions on the clock."""
    return lambda **values: Admission(AdmissionConfig.parse(values), clock=clock)


def refusals(admission: Admission, client: str, number: int) -> int:
    """Call so many times; return how many of the calls were refused for too many calls."""
    num_refused = 0
    for _ in range(number):
        try:
            admission.enter(client)
        except QueueFull:
            num_refused += 1
    return num_refused


def test_calls_in_flight_are_bounded(make: Make) -> None:
    """The bound is exact, refused calls count for nothing, and whoever leaves makes room for one."""
    admission = make(max_calls=10, max_client_share=1.0)
    assert refusals(admission, "a", 15) == 5
    assert admission.num_calls == 10
    with pytest.raises(QueueFull, match=r"^too many calls are in flight; retry in "):
        admission.enter("b")
    admission.leave("a")
    admission.enter("b")
    assert refusals(admission, "b", 1) == 1
    assert admission.num_calls == 10


@pytest.mark.parametrize(("priority", "bound"), [(1, 10), (2, 9), (3, 7)])
def test_the_less_urgent_are_shed_first(make: Make, priority: int, bound: int) -> None:
    """Each priority has its own share of the calls, to the call; the more urgent still come in."""
    admission = make(max_calls=10, max_client_share=1.0, shed_at=(1.0, 0.9, 0.7))
    for _ in range(bound):
        admission.enter("a", priority)
    for lower in range(priority, 4):
        with pytest.raises(QueueFull, match="too many calls"):
            admission.enter("b", lower)
    if priority > 1:
        admission.enter("b", priority - 1)


def test_requests_of_a_stream_count_as_calls_of_the_rate(make: Make, clock: Clock) -> None:
    """A stream of requests is no way around the rate of calls, and takes none of the places."""
    admission = make(rate_limit={"calls_per_s": 3})
    admission.enter("a")
    admission.count_call("a")
    admission.count_call("a")
    with pytest.raises(RateLimited, match="3 calls per second"):
        admission.count_call("a")
    with pytest.raises(RateLimited, match="3 calls per second"):
        admission.enter("a")
    assert admission.num_calls == 1
    clock.now += 1 / 3
    admission.enter("a")
    assert admission.num_calls == 2


def test_a_client_alone_may_use_everything(make: Make) -> None:
    """The share of a client binds only beside others."""
    admission = make(max_calls=10, max_client_share=0.3)
    assert refusals(admission, "a", 10) == 0


def test_beside_others_a_client_has_its_share(make: Make) -> None:
    """While somebody else calls, a client holds its share at most, and the others still come in."""
    admission = make(max_calls=10, max_client_share=0.3)
    admission.enter("b")
    assert refusals(admission, "a", 10) == 7
    with pytest.raises(
        QueueFull, match=r"^3 of your calls are in flight, your share while others call too; retry"
    ):
        admission.enter("a")
    assert refusals(admission, "b", 2) == 0
    for client in ("c", "d"):
        assert refusals(admission, client, 2) == 0
    assert admission.num_calls == 10
    admission.leave("c")
    admission.leave("d")
    admission.leave("a")
    assert refusals(admission, "a", 2) == 1


def test_the_share_binds_no_more_when_the_others_have_left(make: Make) -> None:
    """A client is limited for as long as others call, and not longer."""
    admission = make(max_calls=10, max_client_share=0.5)
    admission.enter("b")
    assert refusals(admission, "a", 6) == 1
    admission.leave("b")
    assert refusals(admission, "a", 5) == 0


def test_a_refused_call_takes_no_token(make: Make, clock: Clock) -> None:
    """Whoever was shed for the calls of others has its rate left."""
    admission = make(max_calls=1, max_client_share=1.0, rate_limit={"calls_per_s": 1})
    admission.enter("a")
    assert refusals(admission, "b", 5) == 5
    admission.leave("a")
    admission.enter("b")
    admission.leave("b")
    with pytest.raises(RateLimited, match=r"^over the limit of 1 calls per second; retry in 1\.00 s$"):
        admission.enter("b")
    assert admission.num_calls == 0
    clock.now += 1
    admission.enter("b")


def test_clients_have_limits_of_their_own(make: Make) -> None:
    """A client by name has its own rate, all others have the common one, each for itself."""
    admission = make(rate_limit={"calls_per_s": 1}, clients={"key:fast": {"calls_per_s": 5}, "key:free": {}})
    for client, expected in (("key:fast", 5), ("key:slow", 1), ("key:other", 1), ("key:free", 50)):
        num_entered = 0
        try:
            for _ in range(50):
                admission.enter(client)
                num_entered += 1
        except RateLimited:
            pass
        assert (client, num_entered) == (client, expected)


def test_nothing_is_limited_by_default(make: Make) -> None:
    """Without rates in the configuration, calls and rows are free."""
    admission = make()
    for _ in range(1000):
        admission.enter("a")
        admission.charge("a", 10**9)
        admission.leave("a")


def test_more_rows_than_the_bucket_holds_are_served_and_paid_for(make: Make, clock: Clock) -> None:
    """A call larger than the burst passes with a full bucket; the debt is waited off before the next row."""
    admission = make(rate_limit={"rows_per_s": 10, "burst_s": 2})
    admission.charge("a", 100)  # 20 saved: 80 of debt
    with pytest.raises(RateLimited, match=r"^over the limit of 10 rows per second") as caught:
        admission.charge("a", 1)
    assert caught.value.retry_after_s == pytest.approx(8.1)
    clock.now += 8.1
    admission.charge("a", 1)
    admission.charge("b", 20)  # of another client: nothing to do with it


@given(
    per_s=st.floats(0.01, 10_000),
    burst_s=st.floats(0.01, 100),
    calls=st.lists(
        st.tuples(st.integers(1, 5000), st.one_of(st.just(0.0), st.floats(0.0, 20.0))), min_size=1, max_size=40
    ),
)
@settings(max_examples=200, deadline=None)
def test_rates_hold_and_hints_are_honest(per_s: float, burst_s: float, calls: list[tuple[int, float]]) -> None:
    """In any time no more passes than rate x time + burst + one call; after the hinted time a call does pass."""
    clock = Clock()
    config = AdmissionConfig.parse({"rate_limit": {"rows_per_s": per_s, "burst_s": burst_s}})
    admission = Admission(config, clock=clock)
    burst = max(1.0, per_s * burst_s)
    began, served, largest = clock.now, 0, 0
    for num_rows, pause_s in calls:
        clock.now += pause_s
        try:
            admission.charge("a", num_rows)
        except RateLimited as limited:
            clock.now += limited.retry_after_s
            admission.charge("a", num_rows)  # exactly then, not a moment later
        served, largest = served + num_rows, max(largest, num_rows)
        assert served <= (per_s * (clock.now - began) + burst + largest) * (1 + 1e-5)


def test_a_rate_that_is_kept_is_never_refused(make: Make, clock: Clock, seed: int) -> None:
    """Who calls at its rate on average, in bunches below the burst, is let in each time."""
    admission = make(rate_limit={"calls_per_s": 10, "burst_s": 3})
    random = np.random.default_rng(seed)
    for _ in range(300):
        number = int(random.integers(1, 10))
        for _ in range(number):
            admission.enter("a")
            admission.leave("a")
        clock.now += number / 10


@pytest.mark.parametrize("per_s", [0.001, 0.1, 1.0])
def test_the_first_call_passes_at_any_rate(make: Make, clock: Clock, per_s: float) -> None:
    """A rate below one call in a burst is slow, and not never."""
    admission = make(rate_limit={"calls_per_s": per_s, "burst_s": 0.5})
    admission.enter("a")
    with pytest.raises(RateLimited) as caught:
        admission.enter("a")
    assert caught.value.retry_after_s == pytest.approx(1 / per_s)
    clock.now += 1 / per_s
    admission.enter("a")


def test_many_clients_do_not_fill_the_memory(make: Make) -> None:
    """Of a flood of names only the last ones are remembered; whoever keeps calling is among them."""
    admission = make(rate_limit={"calls_per_s": 1})
    admission.enter("regular")
    sizes = []
    for index in range(30_000):
        name = f"stranger {index}"
        admission.enter(name)
        admission.leave(name)
        if index % 1000 == 0:
            with pytest.raises(RateLimited):
                admission.enter("regular")  # not forgotten
            sizes.append(_num_reachable(admission))
    assert sizes[-1] == sizes[12] < 100_000
    assert admission.num_calls == 1


def _num_reachable(root: object) -> int:
    """Return the objects that are held, whatever they are called."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, dict):
            waiting.extend([*thing.keys(), *thing.values()])
        elif isinstance(thing, (list, tuple, set)):
            waiting.extend(thing)
        elif hasattr(thing, "__dict__"):
            waiting.append(vars(thing))
    return len(seen)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=200))
@settings(max_examples=100, deadline=None)
def test_entering_and_leaving_balance(steps: list[tuple[str, bool]]) -> None:
    """The number of calls is that of those let in and not gone, and the share is judged by the same numbers."""
    admission = Admission(AdmissionConfig.parse({"max_calls": 8, "max_client_share": 0.5}), clock=Clock())
    own = dict.fromkeys("abc", 0)
    for client, enters in steps:
        total = sum(own.values())
        if not enters:
            if own[client]:
                admission.leave(client)
                own[client] -= 1
            continue
        is_open = total < 8 and (own[client] < 4 or own[client] == total)
        try:
            admission.enter(client)
        except QueueFull:
            assert not is_open
        else:
            assert is_open
            own[client] += 1
        assert admission.num_calls == sum(own.values())


def test_the_hint_follows_the_rate_at_which_calls_end(make: Make, clock: Clock) -> None:
    """With a hundred calls in flight that end every 40 ms, half of them are gone after two seconds."""
    admission = make(max_calls=100, max_client_share=1.0)
    refusals(admission, "a", 100)
    for _ in range(200):
        clock.now += 0.04
        admission.leave("a")
        admission.enter("a")
    with pytest.raises(QueueFull) as caught:
        admission.enter("a")
    assert caught.value.retry_after_s == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("pause_s", [0.0, 1e-6, 1e6])
def test_the_hint_has_bounds(make: Make, clock: Clock, pause_s: float) -> None:
    """However fast or slow calls end, nobody is told to hammer or to stay away for ever."""
    admission = make(max_calls=4, max_client_share=1.0)
    refusals(admission, "a", 4)
    for _ in range(100):
        clock.now += pause_s
        admission.leave("a")
        admission.enter("a")
    with pytest.raises(QueueFull) as caught:
        admission.enter("a")
    assert 0.05 <= caught.value.retry_after_s <= 5.0
