"""Operations, mixes, and what requests hold."""

import numpy as np
import pytest

from serving.loadtest.errors import BadWorkload
from serving.loadtest.workload import ModelFacts, Operation, contents, normalised, parse_mix

FACTS = ModelFacts("small", "0" * 12, (1, 4, 4), 2, 64)


def test_operations_read_as_they_are_named() -> None:
    """A name is method:rows; one row is meant if none is given, and a path has two ends at least."""
    assert Operation.parse("encode:64") == Operation("encode", 64)
    assert Operation.parse(" sample ") == Operation("sample", 1)
    assert Operation.parse("interpolate").rows == 2
    assert Operation.parse(Operation("score", 3).name) == Operation("score", 3)


@pytest.mark.parametrize(
    "text", ["", "train:1", "encode:0", "encode:-1", "encode:x", "interpolate:1", "sample:1.5"]
)
def test_bad_operations(text: str) -> None:
    """What is no operation is named, with those that are."""
    with pytest.raises(BadWorkload, match=r"expected method:rows=share.*reconstruct"):
        Operation.parse(text)


def test_shares_are_normalised() -> None:
    """Shares are relative; what has no share counts as one; zero shares are left out."""
    mix = parse_mix("encode:1=3,decode:16,sample:2=0")
    assert mix == {Operation("encode", 1): 0.75, Operation("decode", 16): 0.25}
    assert sum(normalised(mix).values()) == 1


@pytest.mark.parametrize("text", ["encode:1=-1", "encode:1=x", "encode:1=nan", "encode=1,encode:1=2", "encode=0"])
def test_bad_mixes(text: str) -> None:
    """A mix that means nothing names its option."""
    with pytest.raises(BadWorkload, match=r"^--mix "):
        parse_mix(text)


def test_contents_are_functions_of_their_arguments() -> None:
    """The same arguments ask the same; another index, operation or seed asks something else."""
    operation = Operation("encode", 3)
    first = contents(operation, FACTS, seed=1, index=0)
    assert first.data.shape == (3, 1, 4, 4)
    assert first.latents.shape == (3, 2)
    again = contents(operation, FACTS, seed=1, index=0)
    np.testing.assert_array_equal(first.data, again.data)
    assert first.seed == again.seed
    for other in (
        contents(operation, FACTS, seed=2, index=0),
        contents(operation, FACTS, seed=1, index=1),
        contents(Operation("score", 3), FACTS, seed=1, index=0),
    ):
        assert not np.array_equal(first.data, other.data)
        assert first.seed != other.seed


def test_a_path_has_two_ends() -> None:
    """However many points it has."""
    assert contents(Operation("interpolate", 9), FACTS, seed=1, index=0).latents.shape == (2, 2)
