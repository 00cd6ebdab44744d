"""What is asked for: operations such as encode:64, their shares, and what stands in their requests."""

import zlib
from collections.abc import Mapping
from typing import Final, Literal, NamedTuple, Self, get_args

import numpy as np
from numpy.typing import NDArray

from serving.loadtest.errors import BadWorkload

Mode = Literal["open", "closed", "replay", "knee"]
"""How requests come."""

Method = Literal["encode", "decode", "sample", "reconstruct", "score", "interpolate"]
METHODS: Final[tuple[str, ...]] = get_args(Method)
_EXPECTED: Final = f"method:rows=share, such as encode:1=0.4,sample:64=0.6, of {', '.join(METHODS)}"
_MIN_STEPS: Final = 2
"""A path has two ends."""

_INT64_MAX: Final = 2**63 - 1


class Operation(NamedTuple):
    """A method with a number of rows: for `interpolate` the points of one path."""

    method: Method
    rows: int

    @property
    def name(self) -> str:
        """Name in mixes, recordings and reports."""
        return f"{self.method}:{self.rows}"

    @classmethod
    def parse(cls, text: str, *, option: str = "--mix") -> Self:
        """Return the operation of "encode:64"; one row if no number is given.

        Raises:
            BadWorkload: If there is no such method, or the number of rows means nothing.
        """
        method, _, rows = text.strip().partition(":")
        least = _MIN_STEPS if method == "interpolate" else 1
        given = rows or str(least)
        if method not in METHODS or not given.isdecimal() or int(given) < least:
            raise BadWorkload(option, given=text, expected=_EXPECTED)
        return cls(method, int(given))  # type: ignore[arg-type]  # it is one of them


class ModelFacts(NamedTuple):
    """What the load tester must know of a served model."""

    name: str
    digest: str
    """Version of the weights; empty if the service does not say."""

    data_shape: tuple[int, ...]
    latent_dim: int
    max_rows: int | None
    """Most rows of one call, if the service says so."""


class Contents(NamedTuple):
    """What one request asks, whatever the protocol; an operation uses what it needs."""

    data: NDArray[np.uint8]
    """Rows of data in 255ths, shape (rows, *data_shape)."""

    latents: NDArray[np.float32]
    """Rows of latents, shape (rows, latent_dim)."""

    seed: int
    """Of the draws, in [0, 2^63): both protocols can carry it."""

    first_row: int
    """Number of the first row in the seed's sequence."""


def parse_mix(text: str) -> dict[Operation, float]:
    """Return the shares of "encode:1=0.4,decode:16=0.6", normalised; a share is 1 if none is given.

    Raises:
        BadWorkload: If it does not read so, an operation stands there twice, or no share is above zero.
    """
    shares: dict[Operation, float] = {}
    for part in text.split(","):
        name, _, share = part.partition("=")
        operation = Operation.parse(name)
        try:
            value = float(share) if share else 1.0
        except ValueError:
            raise BadWorkload("--mix", given=text, expected=_EXPECTED) from None
        if not 0 <= value < float("inf"):
            raise BadWorkload("--mix", given=text, expected="shares that are not negative")
        if operation in shares:
            raise BadWorkload("--mix", given=text, expected=f"{operation.name} once")
        shares[operation] = value
    return normalised(shares)


def normalised(shares: Mapping[Operation, float]) -> dict[Operation, float]:
    """Return shares whose sum is one, without those that are zero.

    Raises:
        BadWorkload: If all are zero.
    """
    total = sum(shares.values())
    if not total:
        raise BadWorkload("--mix", given="with all shares zero", expected="a share above zero")
    return {operation: share / total for operation, share in shares.items() if share}


def contents(operation: Operation, facts: ModelFacts, *, seed: int, index: int) -> Contents:
    """Return what request number `index` of an operation asks: a function of the arguments alone.

    Rows for data and latents: those of the operation; the two ends of a path for `interpolate`.
    """
    random = np.random.default_rng([seed, zlib.crc32(operation.name.encode()), index])
    rows = _MIN_STEPS if operation.method == "interpolate" else operation.rows
    return Contents(
        data=random.integers(0, 256, (rows, *facts.data_shape), dtype=np.uint8),
        latents=random.standard_normal((rows, facts.latent_dim), dtype=np.float32),
        seed=int(random.integers(0, _INT64_MAX)),
        first_row=int(random.integers(0, 2**32)),
    )
