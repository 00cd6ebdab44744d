"""What can go wrong, grouped by who must act. No transport is named here; `gateway.statuses` maps.

ServingError
├── InvalidRequest          the caller must change the request; carries the path of the field
│   ├── MalformedMessage
│   ├── MissingField
│   ├── ShapeMismatch
│   ├── UnsupportedType
│   ├── SizeMismatch
│   ├── NotFinite
│   ├── OutOfRange
│   └── TooManyRows
├── UnknownModelVersion     the caller must ask for the loaded version
├── QueueFull               the caller must wait and repeat
├── EngineUnavailable       the caller may repeat; an operator may have to look
├── DeadlineExceeded        the caller gave too little time, or the service is slow
└── StartupError            the operator must act; the process does not start
    ├── BundleError
    ├── PortTaken
    ├── ProviderUnavailable
    └── ServiceFailed
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

_SHOWN: Final = 8


class ServingError(Exception):
    """Base of every error that this package raises on purpose.

    The attributes of an error are the arguments of its constructor, so that it survives pickling.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild from keyword arguments: errors cross processes, and pickle alone drops keywords."""
        arguments = {name: value for name, value in vars(self).items() if name != "__notes__"}
        return partial(type(self), **arguments), ()


class InvalidRequest(ServingError):
    """The request cannot be answered as it is. Abstract: raise one of its leaves."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field

    @property
    def problem(self) -> str:
        """What was expected and what came, without the name of the field."""
        return str(self).removeprefix(f"{self.field}: ")


class MalformedMessage(InvalidRequest):
    """The bytes are not a message of the expected type."""

    def __init__(self, *, message_type: str, field: str = "request") -> None:
        super().__init__(field, f"expected a {message_type} message, got bytes that do not parse")
        self.message_type = message_type


class MissingField(InvalidRequest):
    """A required field is absent."""

    def __init__(self, field: str, *, expected: str) -> None:
        super().__init__(field, f"expected {expected}, got nothing")
        self.expected = expected


class ShapeMismatch(InvalidRequest):
    """A tensor does not have the shape the model expects."""

    def __init__(self, field: str, *, expected: str, actual: Sequence[int]) -> None:
        super().__init__(field, f"expected shape {expected}, got {_shape(actual)}")
        self.expected, self.actual = expected, tuple(actual)


class UnsupportedType(InvalidRequest):
    """A tensor has a type, or an output is asked for in a type, that is not accepted there."""

    def __init__(self, field: str, *, expected: str, actual: str) -> None:
        super().__init__(field, f"expected {expected}, got {actual}")
        self.expected, self.actual = expected, actual


class SizeMismatch(InvalidRequest):
    """The bytes of a tensor are not as many as its type and shape need."""

    def __init__(self, field: str, *, expected_bytes: int, actual_bytes: int) -> None:
        super().__init__(field, f"expected {expected_bytes} bytes for its type and shape, got {actual_bytes}")
        self.expected_bytes, self.actual_bytes = expected_bytes, actual_bytes


class NotFinite(InvalidRequest):
    """A tensor holds NaN or an infinity."""

    def __init__(self, field: str, *, row: int) -> None:
        super().__init__(field, f"expected finite numbers, got NaN or infinity in row {row}")
        self.row = row


class OutOfRange(InvalidRequest):
    """A value is outside its range."""

    def __init__(self, field: str, *, expected: str, actual: str) -> None:
        super().__init__(field, f"expected {expected}, got {actual}")
        self.expected, self.actual = expected, actual


class TooManyRows(InvalidRequest):
    """The call asks for more rows than the limit; split it."""

    def __init__(self, field: str, *, limit: int, actual: int) -> None:
        super().__init__(field, f"expected at most {limit} rows in one call, got {actual}; split it")
        self.limit, self.actual = limit, actual


class UnknownModelVersion(ServingError):
    """The model version asked for is not loaded."""

    def __init__(self, *, asked: str, loaded: str) -> None:
        super().__init__(f"model_version: {asked[:64]!r} is not loaded; {loaded!r} is")
        self.asked, self.loaded = asked, loaded


class QueueFull(ServingError):
    """The queue holds as much as it may; `retry_after_s` estimates when there is room, seconds."""

    def __init__(self, *, retry_after_s: float) -> None:
        super().__init__(f"the service is busy; retry in {retry_after_s:.2f} s")
        self.retry_after_s = retry_after_s


class EngineUnavailable(ServingError):
    """No replica answers now. `detail` is for the log, not for the caller."""

    def __init__(self, *, graph: str, detail: str = "") -> None:
        super().__init__(f"the {graph} is not available now; the call is safe to repeat")
        self.graph, self.detail = graph, detail


class DeadlineExceeded(ServingError):
    """The deadline passed before the answer was ready."""

    def __init__(self) -> None:
        super().__init__("the deadline passed before the answer was ready")


class StartupError(ServingError):
    """The process cannot start. Abstract: raise one of its leaves."""


class BundleError(StartupError):
    """A bundle is missing, damaged, mixed up, or not reproduced by this machine."""

    def __init__(self, *, location: str, problem: str, remedy: str) -> None:
        super().__init__(f"bundle {location}: {problem}; {remedy}")
        self.location, self.problem, self.remedy = location, problem, remedy


class PortTaken(StartupError):
    """Another process listens on the port."""

    def __init__(self, *, address: str) -> None:
        super().__init__(
            f"cannot listen on {address}: the address is in use or not on this machine; "
            "stop the other process or choose another with --port"
        )
        self.address = address


class ProviderUnavailable(StartupError):
    """The execution provider that was asked for cannot be used here."""

    def __init__(self, *, asked: str, actual: str) -> None:
        super().__init__(
            f"{asked} was asked for and ONNX Runtime chose {actual}: no usable GPU, driver or CUDA "
            "libraries here; use --device cpu or repair the installation"
        )
        self.asked, self.actual = asked, actual


class ServiceFailed(StartupError):
    """The deployments did not come up."""

    def __init__(self, *, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _shape(shape: Sequence[int]) -> str:
    """Write a shape, cut after eight dimensions: the caller chose its length."""
    shown = [str(length) for length in shape[:_SHOWN]] + ["..."] * (len(shape) > _SHOWN)
    return f"({', '.join(shown)})"
