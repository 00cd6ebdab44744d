"""Every error survives a process boundary, and the drawn tree is the real one."""

import pickle
import re
from collections.abc import Iterator

import pytest

from serving import errors
from serving.errors import ServingError

EXAMPLES: list[ServingError] = [
    errors.MalformedMessage(message_type="EncodeRequest"),
    errors.MissingField("data", expected="a tensor"),
    errors.ShapeMismatch("data.shape", expected="(rows, 2)", actual=(1, 2, 3)),
    errors.UnsupportedType("data.dtype", expected="FLOAT32", actual="UINT8"),
    errors.SizeMismatch("data.data", expected_bytes=8, actual_bytes=7),
    errors.NotFinite("data.data", row=3),
    errors.OutOfRange("num_steps", expected="at least 2", actual="1"),
    errors.TooManyRows("num_samples", limit=4, actual=5),
    errors.UnknownTensor("inputs[0].name", text="expected 'data', got 'picture'"),
    errors.MixedContents("inputs[0].contents", text="expected raw or typed contents, got both"),
    errors.UnknownModel(model="encoder", version="2"),
    errors.UnknownModelVersion(asked="abc", loaded="def"),
    errors.Unauthenticated(expected="an API key", detail="no such key"),
    errors.MetadataTooLarge(limit=16_384, actual=20_000),
    errors.PermissionDenied(client="key:a", method="vae.v1.VaeService/Encode"),
    errors.MethodDisabled(method="RepositoryModelLoad", setting="gateway.repository_control"),
    errors.QueueFull(retry_after_s=0.25),
    errors.RateLimited(retry_after_s=1.5, limit="10 rows per second"),
    errors.ModelUnloaded(model="encoder"),
    errors.Draining(),
    errors.EngineUnavailable(graph="encoder", detail="lost"),
    errors.DeadlineExceeded(),
    errors.DeadlineTooShort(given_s=0.001, needed_s=0.25),
    errors.RequestStalled(timeout_s=10.0),
    errors.ResponseStalled(timeout_s=30.0),
    errors.BundleError(location="b", problem="p", remedy="r"),
    errors.PortTaken(address="127.0.0.1:1"),
    errors.CredentialsError(source="server.pem", problem="no certificate in it"),
    errors.TracingUnavailable(missing="opentelemetry.sdk"),
    errors.ProviderUnavailable(asked="a", actual="b"),
    errors.ServiceFailed(reason="why"),
]


def _leaves(kind: type[ServingError]) -> Iterator[type[ServingError]]:
    children = kind.__subclasses__()
    if not children:
        yield kind
    for child in children:
        yield from _leaves(child)


def _tree(kind: type[ServingError], depth: int = 0) -> list[tuple[int, str]]:
    return [(depth, kind.__name__), *(line for child in kind.__subclasses__() for line in _tree(child, depth + 1))]


def test_every_leaf_has_an_example() -> None:
    """A new error must be added to the examples, so that the laws below hold for it."""
    assert {type(error) for error in EXAMPLES} == set(_leaves(ServingError))


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_survives_pickling(error: ServingError) -> None:
    """Class, text and every attribute are the same in the other process, also after two trips."""
    other = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(error))))  # noqa: S301 - our own bytes
    assert type(other) is type(error)
    assert str(other) == str(error)
    assert vars(other) == vars(error)


def test_an_error_with_a_note_survives_pickling() -> None:
    """What a caller adds with `add_note` does not keep an error from crossing processes."""
    error = errors.NotFinite("data", row=1)
    error.add_note("seen by the tests")
    other = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert (str(other), other.row) == (str(error), 1)


def test_the_tree_in_the_docstring_is_the_real_one() -> None:
    """A reader may trust the drawing."""
    lines = (errors.__doc__ or "").splitlines()
    drawn = [
        (len(match[1]) // 4, match[2])
        for line in lines
        if (match := re.match(r"^((?:[│ ]   )*(?:[├└]── )?)([A-Z]\w+)(?:  |$)", line))
    ]
    assert drawn == _tree(ServingError)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_a_text_is_one_line_that_names_no_class(error: ServingError) -> None:
    """Texts are for people: one line, no Python."""
    text = str(error)
    assert text
    assert "\n" not in text
    assert type(error).__name__ not in text


def test_bad_input_names_its_field_first() -> None:
    """The text of bad input is the path of the field, a colon, and the problem."""
    for error in EXAMPLES:
        if isinstance(error, errors.InvalidRequest):
            assert str(error) == f"{error.field}: {error.problem}"


def test_a_long_shape_is_cut() -> None:
    """The caller chose the rank: the text does not grow with it."""
    error = errors.ShapeMismatch("data.shape", expected="(rows, 2)", actual=[1] * 100_000)
    assert str(error).endswith("got (1, 1, 1, 1, 1, 1, 1, 1, ...)")


def test_a_long_version_is_cut() -> None:
    """The caller chose the version: the text does not grow with it."""
    assert len(str(errors.UnknownModelVersion(asked="x" * 10_000, loaded="a"))) < 200


@pytest.mark.parametrize(
    "error",
    [
        errors.UnknownModel(model="x" * 10_000, version="y" * 10_000),
        errors.ModelUnloaded(model="x" * 10_000),
        errors.PermissionDenied(client="jwt:" + "x" * 10_000, method="vae.v1.VaeService/Encode"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_long_name_is_cut(error: ServingError) -> None:
    """The caller chose the name: the text does not grow with it."""
    assert len(str(error)) < 250


def test_what_an_operator_must_see_is_not_in_the_text() -> None:
    """The reason why credentials were refused, or a replica was lost, is for the log alone."""
    for error in (
        errors.Unauthenticated(expected="an API key", detail="revealing"),
        errors.EngineUnavailable(graph="encoder", detail="revealing"),
    ):
        assert "revealing" not in str(error)


def test_who_is_busy_says_for_how_long() -> None:
    """Everything that may be repeated after a while carries the time, in the text too."""
    for error in EXAMPLES:
        if isinstance(error, errors.Busy):
            assert f"retry in {error.retry_after_s:.2f} s" in str(error)
