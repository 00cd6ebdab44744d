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
│   ├── TooManyRows
│   ├── UnknownTensor
│   └── MixedContents
├── UnknownModel            the caller must ask for a model that exists
├── UnknownModelVersion     the caller must ask for the loaded version
├── Unauthenticated         the caller must bring valid credentials
├── MetadataTooLarge        the caller must send less beside the body
├── PermissionDenied        the caller may not call this method
├── MethodDisabled          an operator must switch the method on
├── Busy                    the caller must wait and repeat; carries for how long
│   ├── QueueFull
│   └── RateLimited
├── ModelUnloaded           an operator took the model out of service
├── Draining                the caller must go on with another server
├── EngineUnavailable       the caller may repeat; an operator may have to look
├── DeadlineExceeded        the caller gave too little time, or the service is slow
├── DeadlineTooShort        the caller gave too little time: the call was not begun
├── RequestStalled          the caller did not send its request in time
├── ResponseStalled         the caller did not read the answer in time
└── StartupError            the operator must act; the process does not start
    ├── BundleError
    ├── PortTaken
    ├── CredentialsError
    ├── ProviderUnavailable
    ├── TracingUnavailable
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


class UnknownTensor(InvalidRequest):
    """An input or output is named that the model does not have, or one that it needs is absent or named twice."""

    def __init__(self, field: str, *, text: str) -> None:
        super().__init__(field, text)
        self.text = text


class MixedContents(InvalidRequest):
    """Tensor contents are given in two ways at once, or in a way their type does not allow."""

    def __init__(self, field: str, *, text: str) -> None:
        super().__init__(field, text)
        self.text = text


class UnknownModel(ServingError):
    """The model asked for does not exist. The wording is Triton's: clients match on it."""

    def __init__(self, *, model: str, version: str = "") -> None:
        which = f"'{model[:64]}' version {version[:16]}" if version else f"'{model[:64]}'"
        super().__init__(f"Request for unknown model: {which} is not found")
        self.model, self.version = model, version


class UnknownModelVersion(ServingError):
    """The model version asked for is not loaded."""

    def __init__(self, *, asked: str, loaded: str) -> None:
        super().__init__(f"model_version: {asked[:64]!r} is not loaded; {loaded!r} is")
        self.asked, self.loaded = asked, loaded


class Unauthenticated(ServingError):
    """The caller brought no valid credentials. `detail` is for the log: a stranger learns nothing from it."""

    def __init__(self, *, expected: str, detail: str = "") -> None:
        super().__init__(f"no valid credentials; this service expects {expected}")
        self.expected, self.detail = expected, detail


class MetadataTooLarge(ServingError):
    """The call brings more metadata than the limit."""

    def __init__(self, *, limit: int, actual: int) -> None:
        super().__init__(f"expected at most {limit} bytes of metadata, got {actual}")
        self.limit, self.actual = limit, actual


class PermissionDenied(ServingError):
    """The caller is known and may not call this method."""

    def __init__(self, *, client: str, method: str) -> None:
        super().__init__(f"{client[:128]} may not call {method}; ask the operator for a grant")
        self.client, self.method = client, method


class MethodDisabled(ServingError):
    """The method is switched off in this service."""

    def __init__(self, *, method: str, setting: str) -> None:
        super().__init__(f"{method} is switched off here; an operator can set {setting}")
        self.method, self.setting = method, setting


class Busy(ServingError):
    """The call was not begun; `retry_after_s` says when to come back, seconds. Abstract: raise a leaf."""

    retry_after_s: float


class QueueFull(Busy):
    """The service holds as much as it may; `retry_after_s` estimates when there is room, seconds."""

    def __init__(self, *, retry_after_s: float, what: str = "the service is busy") -> None:
        super().__init__(f"{what}; retry in {retry_after_s:.2f} s")
        self.retry_after_s, self.what = retry_after_s, what


class RateLimited(Busy):
    """The caller exceeds its own rate; `retry_after_s` says when it has room again, seconds."""

    def __init__(self, *, retry_after_s: float, limit: str) -> None:
        super().__init__(f"over the limit of {limit}; retry in {retry_after_s:.2f} s")
        self.retry_after_s, self.limit = retry_after_s, limit


class ModelUnloaded(ServingError):
    """An operator took the model out of service."""

    def __init__(self, *, model: str) -> None:
        super().__init__(f"Request for unknown model: '{model[:64]}' has no available versions")
        self.model = model


class Draining(ServingError):
    """This server is about to stop. What a stream has sent is right; the rest can be asked for elsewhere."""

    def __init__(self) -> None:
        super().__init__("this server is about to stop; go on with another from where the stream ended")


class EngineUnavailable(ServingError):
    """No replica answers now. `detail` is for the log, not for the caller."""

    def __init__(self, *, graph: str, detail: str = "") -> None:
        super().__init__(f"the {graph} is not available now; the call is safe to repeat")
        self.graph, self.detail = graph, detail


class DeadlineExceeded(ServingError):
    """The deadline passed before the answer was ready."""

    def __init__(self) -> None:
        super().__init__("the deadline passed before the answer was ready")


class DeadlineTooShort(ServingError):
    """The call cannot finish before its deadline, so it was not begun."""

    def __init__(self, *, given_s: float, needed_s: float) -> None:
        super().__init__(
            f"the deadline leaves {given_s:.3f} s, and a call like this takes about {needed_s:.3f} s; give it more"
        )
        self.given_s, self.needed_s = given_s, needed_s


class RequestStalled(ServingError):
    """The body of the request did not arrive in time."""

    def __init__(self, *, timeout_s: float) -> None:
        super().__init__(f"the request did not arrive within {timeout_s:g} s")
        self.timeout_s = timeout_s


class ResponseStalled(ServingError):
    """The caller did not read the answer in time."""

    def __init__(self, *, timeout_s: float) -> None:
        super().__init__(f"the answer was not read for {timeout_s:g} s; resume from the first row that is missing")
        self.timeout_s = timeout_s


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


class CredentialsError(StartupError):
    """A certificate, a key file or a key set cannot be read, or plaintext would leave the machine."""

    def __init__(self, *, source: str, problem: str) -> None:
        super().__init__(f"{source}: {problem}")
        self.source, self.problem = source, problem


class ProviderUnavailable(StartupError):
    """The execution provider that was asked for cannot be used here."""

    def __init__(self, *, asked: str, actual: str) -> None:
        super().__init__(
            f"{asked} was asked for and ONNX Runtime chose {actual}: no usable GPU, driver or CUDA "
            "libraries here; use --device cpu or repair the installation"
        )
        self.asked, self.actual = asked, actual


class TracingUnavailable(StartupError):
    """Traces are asked for, and what sends them is not installed."""

    def __init__(self, *, missing: str) -> None:
        super().__init__(
            f"tracing.exporter=otlp needs OpenTelemetry, and {missing} is missing: "
            "pip install 'vae-serving[tracing]', or leave tracing.exporter at none"
        )
        self.missing = missing


class ServiceFailed(StartupError):
    """The deployments did not come up."""

    def __init__(self, *, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _shape(shape: Sequence[int]) -> str:
    """Write a shape, cut after eight dimensions: the caller chose its length."""
    shown = [str(length) for length in shape[:_SHOWN]] + ["..."] * (len(shape) > _SHOWN)
    return f"({', '.join(shown)})"
