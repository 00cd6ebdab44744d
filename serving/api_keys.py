"""API keys: how they are made, how they are kept, and whose one is.

A key is 256 random bits, so a plain SHA-256 of it is safe to keep: there is nothing to guess that a slow hash
would have to protect, as it must protect what people choose. Whoever reads the file learns no key.
"""

import hashlib
import re
import secrets
from collections.abc import Iterable
from datetime import UTC, date, datetime, time
from typing import Final, NamedTuple

import yaml

PREFIX: Final = "vae_"
"""What keys begin with, so that scanners for leaked secrets find them."""

_NUM_BYTES: Final = 32
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_FIELDS: Final = {"name", "sha256", "created", "expires"}


class ApiKey(NamedTuple):
    """What is kept of a key."""

    name: str
    """Whose it is. Several keys may share a name, which is how one rotates."""

    sha256: str
    """Digest of the key, 64 lower-case hexadecimal digits."""

    created: datetime | None = None
    """When it was made, UTC."""

    expires: datetime | None = None
    """From when it is refused, UTC; never if absent."""

    def is_expired(self, now: datetime) -> bool:
        """Return whether it is refused at a time."""
        return self.expires is not None and now >= self.expires


def new_key() -> str:
    """Return a new key: 256 random bits, fit for a header."""
    return PREFIX + secrets.token_urlsafe(_NUM_BYTES)


def digest_of(key: str) -> str:
    """Return what is kept of a key."""
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()


def check_name(name: str) -> str:
    """Return a name as it is.

    Raises:
        ValueError: If it is not fit for a key.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"name {name[:80]!r}: expected 1 to 64 letters, digits, '.', '_', '-'")
    return name


def parse_file(content: bytes) -> list[ApiKey]:
    """Return the keys of a YAML file: a list of `name`, `sha256` and, optionally, `created` and `expires`.

    Raises:
        ValueError: If it is not such a list, or two entries are the same key.
    """
    try:
        entries = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none
        where = getattr(error, "problem_mark", None)
        raise ValueError(f"not YAML{f', line {where.line + 1}' if where else ''}; repair or restore it") from None
    if entries is None:
        raise ValueError("is empty; write [] where there are no keys")
    if not isinstance(entries, list):
        raise ValueError("expected a list of name and sha256; `vae-serve keys new NAME --file FILE` writes one")  # noqa: TRY004 - one class for all that is wrong in a file
    return unique(_entry(index, entry) for index, entry in enumerate(entries))


def parse_variable(text: str) -> list[ApiKey]:
    """Return the keys of `name:sha256`, separated by commas or newlines.

    Raises:
        ValueError: If there is none, one is not of this form, or two are the same.
    """
    parts = [part.strip() for part in re.split(r"[,\n]", text)]
    keys = []
    for index, part in enumerate(filter(None, parts)):
        name, _, digest = part.partition(":")
        keys.append(_entry(index, {"name": name.strip(), "sha256": digest.strip()}))
    if not keys:
        raise ValueError("is set and names no key; unset it, or set it to name:sha256,...")
    return unique(keys)


def unique(keys: Iterable[ApiKey]) -> list[ApiKey]:
    """Return keys as they are.

    Raises:
        ValueError: If two are the same key.
    """
    seen: dict[str, ApiKey] = {}
    for key in keys:
        if (other := seen.setdefault(key.sha256, key)) is not key:
            raise ValueError(f"{other.name!r} and {key.name!r} are the same key; remove one")
    return list(seen.values())


def _entry(index: int, entry: object) -> ApiKey:
    where = f"key {index + 1}"
    if not isinstance(entry, dict) or not {"name", "sha256"} <= entry.keys() <= _FIELDS:
        raise ValueError(f"{where}: expected name, sha256 and perhaps created and expires, nothing else")
    try:
        name = check_name(str(entry["name"]))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    digest = str(entry["sha256"]).lower()
    if not _DIGEST.fullmatch(digest):
        # What was put there may be the key itself: it is not repeated.
        raise ValueError(f"{where} ({name}): sha256 is not 64 hexadecimal digits; keep the digest, not the key")
    return ApiKey(name, digest, _time(where, entry.get("created")), _time(where, entry.get("expires")))


def _time(where: str, value: object) -> datetime | None:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            value = ""
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime.combine(value, time())
    if value is not None and not isinstance(value, datetime):
        raise ValueError(f"{where}: expected a time such as 2027-01-31T00:00:00Z")
    if value is None:
        return None
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
