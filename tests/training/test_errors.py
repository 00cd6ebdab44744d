"""The tree of errors is what its docstring draws, and decides the exit codes."""

import inspect
import pickle
import re
from collections.abc import Sequence
from typing import Any, get_type_hints

import pytest

from training import errors
from training.errors import GateFailed, InvalidSetup, TrainingError


def _classes() -> list[type[TrainingError]]:
    return [
        member for _, member in inspect.getmembers(errors, inspect.isclass) if issubclass(member, TrainingError)
    ]


def test_docstring_draws_every_error() -> None:
    """The drawn tree is complete and names nothing that does not exist."""
    drawn = set(re.findall(r"^[│├└─ ]*([A-Z]\w+)", inspect.getdoc(errors) or "", flags=re.MULTILINE))
    assert {member.__name__ for member in _classes()} == drawn - {"What"}


def test_every_error_belongs_to_a_group() -> None:
    """Whoever must act is known for every error: exit code 2 is theirs, 3 is ours."""
    leaves = [member for member in _classes() if not member.__subclasses__()]
    assert len(leaves) > 8
    assert all(issubclass(leaf, InvalidSetup | GateFailed) for leaf in leaves)
    assert (InvalidSetup.exit_code, GateFailed.exit_code) == (2, 3)


_EXAMPLES: dict[object, Any] = {str: "text", int: 3, float: 0.5, Sequence[str]: ("one", "two")}


def _example(kind: Any) -> Any:  # noqa: ANN401  # of any type that a constructor takes
    """Return a value of a type that an error's constructor takes."""
    return next((value for known, value in _EXAMPLES.items() if kind == known), ("other", 2))


@pytest.mark.parametrize("leaf", [member for member in _classes() if not member.__subclasses__()])
def test_every_error_survives_the_way_to_another_process(leaf: type[TrainingError]) -> None:
    """A worker's error ends the command with the same text, fields and exit code."""
    hints = get_type_hints(leaf.__init__)
    given = {name: _example(hints[name]) for name in inspect.signature(leaf).parameters}
    error = leaf(**given)
    read = pickle.loads(pickle.dumps(error))  # noqa: S301  # our own bytes
    assert type(read) is leaf
    assert (str(read), vars(read)) == (str(error), vars(error))
