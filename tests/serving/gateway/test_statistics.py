"""Statistics of a model: sums of what the tickets told."""

from serving.gateway.statistics import Statistics
from serving.tickets import Ticket

NOW = 1_700_000_000.5


def _ticket(num_rows: int, run_share: float) -> Ticket:
    ticket = Ticket(0.0)
    ticket.num_rows, ticket.run_share, ticket.queue_s, ticket.run_s = num_rows, run_share, 0.25, 0.5
    return ticket


def test_counts_and_times_add_up() -> None:
    """Requests, rows and nanoseconds are sums; the last success has its time, milliseconds since 1970."""
    statistics = Statistics(wall_clock=lambda: NOW)
    for num_rows in (3, 4):
        statistics.succeed(_ticket(num_rows, 1.0), total_s=1.0, input_s=0.125, output_s=0.0625)
    statistics.fail(2.0)
    found = statistics.message("m", "1")
    own = found.inference_stats
    assert (found.name, found.version, found.last_inference) == ("m", "1", 1_700_000_000_500)
    assert (found.inference_count, found.execution_count) == (7, 2)
    times = [own.success, own.queue, own.compute_input, own.compute_infer, own.compute_output]
    assert [time.count for time in times] == [2] * 5
    assert [time.ns for time in times] == [2_000_000_000, 500_000_000, 250_000_000, 1_000_000_000, 125_000_000]
    assert (own.fail.count, own.fail.ns) == (1, 2_000_000_000)


def test_a_shared_run_counts_once() -> None:
    """Eight requests in one run are one run; the count never falls and is never zero after a success."""
    statistics = Statistics()
    seen = [statistics.message("m", "1").execution_count]
    for _ in range(16):
        statistics.succeed(_ticket(1, 1 / 8), total_s=1.0, input_s=0.0, output_s=0.0)
        seen.append(statistics.message("m", "1").execution_count)
    assert seen == sorted(seen)
    assert (seen[0], seen[1], seen[8], seen[16]) == (0, 1, 1, 2)


def test_nothing_done_is_zero() -> None:
    """Before the first request there is no last one."""
    found = Statistics().message("m", "1")
    assert (found.last_inference, found.inference_count, found.inference_stats.success.ns) == (0, 0, 0)
