"""What keeps a load test from beginning or from being read. What goes wrong under load is counted, not raised.

LoadTestError
├── BadWorkload           the caller: a mix, rates or concurrency that mean nothing
├── BadArrivals           the caller: a file of arrivals
├── ReportError           the caller: a report
├── ServiceNotReady       the service: not there, or it refuses a valid request made alone
├── ContentDiffers        the service: an answer differs from the bundle's own graphs before there is any load
└── GeneratorDied         this machine: a process of the generator ended by itself
"""


class LoadTestError(Exception):
    """Base: the text names what was wrong and what to do."""

    is_callers_fault = True
    """Whether the command is wrong, rather than the service."""


class BadWorkload(LoadTestError):
    """What was asked for means nothing."""

    def __init__(self, option: str, *, given: str, expected: str) -> None:
        super().__init__(f"{option} {given}: expected {expected}")
        self.option, self.given, self.expected = option, given, expected


class BadArrivals(LoadTestError):
    """A file of arrivals cannot be replayed."""

    def __init__(self, *, path: str, line: int, problem: str) -> None:
        super().__init__(f"{path}, line {line}: {problem}")
        self.path, self.line, self.problem = path, line, problem


class ReportError(LoadTestError):
    """A report cannot be read."""

    def __init__(self, *, path: str, problem: str) -> None:
        super().__init__(f"report {path}: {problem}; expected a JSON file that `vae-serve load --json` wrote")
        self.path, self.problem = path, problem


class ServiceNotReady(LoadTestError):
    """The service cannot be reached, or does not answer a valid request that is made alone."""

    is_callers_fault = False

    def __init__(self, *, target: str, problem: str) -> None:
        super().__init__(f"{target}: {problem}")
        self.target, self.problem = target, problem


class ContentDiffers(LoadTestError):
    """An answer differs from what the bundle's graphs give here, before there is any load."""

    is_callers_fault = False

    def __init__(self, *, operation: str, problem: str) -> None:
        super().__init__(
            f"{operation}: {problem}, without any load; on another kind of processor, or with another precision, "
            f"give --tolerance"
        )
        self.operation, self.problem = operation, problem


class GeneratorDied(LoadTestError):
    """A process that makes the load ended by itself."""

    is_callers_fault = False

    def __init__(self, *, exit_code: int | None) -> None:
        super().__init__(f"a process of the generator ended with exit code {exit_code}; was it out of memory?")
        self.exit_code = exit_code
