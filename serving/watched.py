"""Files that are read again when they change, so that keys and certificates rotate without a restart."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Generic, TypeVar

from serving.errors import CredentialsError

logger = logging.getLogger(__name__)

T = TypeVar("T")
Stamp = tuple[tuple[int, int, int], ...]

MAX_BYTES: Final = 2**20
"""Largest file that is read, bytes."""

_RETRY_S: Final = 10.0
"""Time after which files that were refused are tried again, seconds: what they wait for may not be a change of
theirs, such as the day from which a certificate is valid."""


class Watched(Generic[T]):
    """What is read from some files. They are read again when time of change, size or inode differ.

    May be used by several threads.

    Args:
        paths: Files that belong together.
        parse: Makes the value of their contents; raises ValueError with a text for the operator.

    Raises:
        CredentialsError: If a file cannot be read, or together they are not fit.
    """

    def __init__(self, paths: Sequence[str], parse: Callable[..., T]) -> None:
        self._paths, self._parse = [Path(path) for path in paths], parse
        self._lock = threading.Lock()
        self._refused = ""
        self._retry_at = 0.0
        self._stamp = self._look()
        self.value = self._read()

    def is_stale(self) -> bool:
        """Return whether `refresh` would read the files: cheap enough for every second and every connection."""
        try:
            is_changed = self._look() != self._stamp
        except CredentialsError:
            is_changed = True
        return is_changed or (bool(self._refused) and time.monotonic() >= self._retry_at)

    def refresh(self) -> bool:
        """Read the files if they changed; return whether the value is new. What is not fit is logged, not used."""
        with self._lock:
            if not self.is_stale():
                return False
            self._retry_at = time.monotonic() + _RETRY_S
            try:
                # Looked at before they are read: a change in between shows next time.
                self._stamp = self._look()
                self.value = self._read()
            except CredentialsError as error:
                if str(error) != self._refused:
                    logger.warning("files ignored, the old ones stay in use", extra={"reason": str(error)})
                self._refused = str(error)
                return False
            self._refused = ""
            return True

    def _look(self) -> Stamp:
        stamp = []
        for path in self._paths:
            try:
                found = path.stat()
            except OSError as error:
                raise _unreadable(path, error) from None
            stamp.append((found.st_mtime_ns, found.st_size, found.st_ino))
        return tuple(stamp)

    def _read(self) -> T:
        contents = []
        for path in self._paths:
            try:
                with path.open("rb") as file:
                    content = file.read(MAX_BYTES + 1)
            except OSError as error:
                raise _unreadable(path, error) from None
            if len(content) > MAX_BYTES:
                raise CredentialsError(source=str(path), problem=f"is larger than {MAX_BYTES} bytes")
            contents.append(content)
        try:
            return self._parse(*contents)
        except ValueError as error:
            raise CredentialsError(source=" and ".join(map(str, self._paths)), problem=str(error)) from None


def _unreadable(path: Path, error: OSError) -> CredentialsError:
    reason = (error.strerror or "not readable").lower()
    return CredentialsError(
        source=str(path), problem=f"cannot be read ({reason}); name a file that this user can read"
    )
