"""Laws of `serving.typed_config`: strict keys, readable errors, overrides that mean what they look like."""

import pytest
from pydantic import Field, ValidationError

from serving.typed_config import Config, ConfigError


class Inner(Config):
    """Inside."""

    rate: float = Field(default=0.1, gt=0)
    """A rate."""

    count: int | None = None
    """A number, or none."""


class Outer(Config):
    """Outside."""

    name: str = "x"
    """A name."""

    sizes: tuple[int, ...] = (1,)
    """Sizes."""

    is_on: bool = False
    """A switch."""

    inner: Inner = Inner()
    """The inside."""


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("name=y", {"name": "y"}),
        ("name=a=b", {"name": "a=b"}),
        ("name=bee", {"name": "bee"}),
        (" name =y", {"name": "y"}),
        ("sizes=[1, 2]", {"sizes": (1, 2)}),
        ("is_on=true", {"is_on": True}),
        ("inner.rate=1e-3", {"inner": {"rate": 1e-3, "count": None}}),
        ("inner.rate=5E2", {"inner": {"rate": 500.0, "count": None}}),
        ("inner.count=7", {"inner": {"rate": 0.1, "count": 7}}),
        ("inner.count=null", {"inner": {"rate": 0.1, "count": None}}),
    ],
)
def test_an_override_means_what_it_looks_like(assignment: str, expected: dict[str, object]) -> None:
    """Values are read as YAML, with exponents, and change the named key alone."""
    assert Outer().override([assignment]).model_dump() == Outer().model_dump() | expected


def test_later_overrides_win() -> None:
    """Assignments apply in order."""
    assert Outer().override(["name=a", "name=b"]).name == "b"


def test_overriding_changes_a_copy() -> None:
    """The original keeps its values."""
    outer = Outer()
    outer.override(["inner.rate=2"])
    assert outer == Outer()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("name", r"^override 'name': write key=value, such as seed=1$"),
        ("nam=y", r"^override 'nam': no such key; known here: inner, is_on, name, sizes$"),
        ("inner.rat=1", r"^override 'inner.rat': no such key; known here: count, rate$"),
        ("name.first=1", r"^override 'name.first': no such key; known here: none$"),
        ("=1", r"^override '': no such key"),
        ("inner.rate=-1", r"^inner\.rate: Input should be greater than 0 \(got -1\)$"),
        ("inner=5", r"^inner: .*\(got 5\)$"),
        ("sizes=[1,", r"^override value '\[1,' is not valid YAML$"),
        ("name=[e", r"^override value '\[e' is not valid YAML$"),
        ("name=2024-13-01", r"(not valid YAML|name: )"),
    ],
)
def test_a_wrong_override_is_one_readable_error(assignment: str, message: str) -> None:
    """Whatever is wrong with an override is a ConfigError that says what, and what is known."""
    with pytest.raises(ConfigError, match=message):
        Outer().override([assignment])


def test_unknown_keys_are_refused_by_name() -> None:
    """A key that does not exist is named in the error, with its path."""
    with pytest.raises(ConfigError, match=r"^inner\.speed: Extra inputs are not permitted$"):
        Outer.parse({"inner": {"speed": 1}})


def test_every_error_is_reported_at_once() -> None:
    """Two wrong values give one text with both."""
    with pytest.raises(ConfigError, match=r"^name: .*; inner\.rate: .*$"):
        Outer.parse({"name": [], "inner": {"rate": 0}})


def test_a_configuration_is_frozen() -> None:
    """Nobody changes a configuration behind another's back."""
    with pytest.raises(ValidationError, match="frozen"):
        Outer().name = "y"  # type: ignore[misc]


def test_the_docstring_under_a_field_is_its_description() -> None:
    """Tools can show what a field means."""
    assert Outer.model_fields["name"].description == "A name."
