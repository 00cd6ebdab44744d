"""The tree of errors is what its docstring draws, and decides the exit codes."""

import inspect
import re

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
