"""What travels with the rows of one call: until when, for whom, how urgent; and what came of it."""

from typing import Final

from serving.spans import CallTrace

HIGHEST: Final = 1
"""Priority of what a caller has sent: Encode, Decode and what is made of them."""

GENERATION: Final = 2
"""Priority of what is drawn from the prior."""

LOWEST: Final = 3
"""Priority of background work, on request."""


class Ticket:
    """One request on its way through the queues.

    Args:
        expires_at: Monotonic time after which nobody waits for the answer.
        client: Whose rows they are, for fair shares and rates; empty if there is nobody to tell apart.
        priority: From 1, the highest, to 3.
    """

    __slots__ = (
        "batch_rows", "client", "expires_at", "num_rows", "priority", "queue_s", "run_s", "run_share", "seed",
        "trace",
    )  # fmt: skip

    def __init__(self, expires_at: float, *, client: str = "", priority: int = HIGHEST) -> None:
        self.expires_at, self.client, self.priority = expires_at, client, priority
        self.num_rows = 0
        """Rows that were run for it, in all graphs."""
        self.queue_s = 0.0
        """Time its rows waited before their first run, seconds, summed over graphs."""
        self.run_s = 0.0
        """Time from the begin of their first run to the end of their last, seconds, summed over graphs."""
        self.run_share = 0.0
        """Runs that it took, where a run with rows of others counts by its share of the rows."""
        self.batch_rows = 0
        """Rows of the largest run that it took part in, those of others included."""
        self.seed: int | None = None
        """Seed of what was drawn for it, the caller's or one that was chosen."""
        self.trace: CallTrace | None = None
        """Where what happens to it is noted; None unless its call is traced."""

    def demote(self, priority: int) -> None:
        """Lower the priority: a caller may step back, never ahead. Zero means as it is."""
        self.priority = min(max(self.priority, priority), LOWEST)

    def part(self, expires_at: float) -> "Ticket":
        """Return a ticket for a part of the work, which expires no later than the whole."""
        part = Ticket(min(expires_at, self.expires_at), client=self.client, priority=self.priority)
        part.trace = self.trace
        return part

    def add(self, part: "Ticket") -> None:
        """Count what a part took."""
        self.num_rows += part.num_rows
        self.queue_s += part.queue_s
        self.run_s += part.run_s
        self.run_share += part.run_share
        self.batch_rows = max(self.batch_rows, part.batch_rows)
        self.seed = part.seed if self.seed is None else self.seed
