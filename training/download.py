"""Fetches a file from the first mirror that gives it: resumable, verified, and never half there.

Bytes go to `<file>.<mirror>.part`, which a later attempt continues by an HTTP Range request. Only when the
unpacked bytes have the expected digest does the file get its name. The part's name holds the mirror, since
mirrors compress the same bytes differently.
"""

import contextlib
import gzip
import hashlib
import http.client
import io
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from training.errors import DataCorrupt, DataMissing, DownloadFailed

Progress = Callable[[str, int, int | None], None]
"""Called with (file name, bytes so far, bytes in all or None if unknown)."""

_ATTEMPTS: Final = 3
_PAUSE_S: Final = 0.5
_MAX_BYTES: Final = 64 * 2**20
"""Most bytes of one file: the digest is compared at the end, and the disk must not be full by then."""

_TIMEOUT_S: Final = 30.0
_CHUNK_BYTES: Final = 256 * 1024
_PARTIAL_CONTENT: Final = 206
_RANGE_NOT_SATISFIABLE: Final = 416


class RemoteFile(NamedTuple):
    """An official file: its name when unpacked, its size and its digest."""

    name: str
    size_bytes: int
    sha256: str


def fetch(file: RemoteFile, folder: Path, mirrors: Sequence[str], *, progress: Progress | None = None) -> Path:
    """Download `<file.name>.gz` into a folder and return its path.

    Args:
        file: What the unpacked bytes must be.
        folder: Where to put it; created.
        mirrors: Addresses (http or https) that the file name is appended to, tried in order.
        progress: Told about every chunk.

    Raises:
        DataCorrupt: If the last mirror gave a complete file with another digest; nothing is left of it.
        DownloadFailed: If no mirror gave a complete file; what came stays as a part.
        DataMissing: If the folder cannot be written.
    """
    target = folder / f"{file.name}.gz"
    reasons: list[str] = []
    corrupt: DataCorrupt | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for mirror in mirrors:
            part = _part(target, mirror)
            try:
                _download(f"{mirror.rstrip('/')}/{target.name}", part, progress or _ignore)
                unpack(part, file)
            except DataCorrupt as error:
                corrupt = error
                part.unlink()
            except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
                reasons.append(f"{mirror}: {error}")
            else:
                part.replace(target)
                return target
    except OSError as error:
        raise DataMissing(file=file.name, problem=f"cannot be written to {folder}: {error.strerror}") from None
    if corrupt is not None:
        raise corrupt
    raise DownloadFailed(file=file.name, reasons=reasons)


def unpack(path: Path, file: RemoteFile) -> bytes:
    """Return the verified content of a file, unpacking it if it is compressed.

    Raises:
        DataCorrupt: If the content does not have the expected digest.
    """
    packed = path.read_bytes()
    content = packed
    if packed[:2] == b"\x1f\x8b":
        # Damaged: the digest of what is there says it all.
        with contextlib.suppress(EOFError, OSError, zlib.error):
            # One byte more than expected shows a longer file, without unpacking all of it.
            content = gzip.GzipFile(fileobj=io.BytesIO(packed)).read(file.size_bytes + 1)
    actual = hashlib.sha256(content).hexdigest()
    if actual != file.sha256:
        raise DataCorrupt(file=file.name, expected=file.sha256, actual=actual)
    return content


def _part(target: Path, mirror: str) -> Path:
    return target.with_name(f"{target.name}.{hashlib.sha256(mirror.encode()).hexdigest()[:8]}.part")


def _download(url: str, part: Path, progress: Progress) -> None:
    """Complete the part; a broken transfer is continued where it stopped."""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_S)
        try:
            if _transfer(url, part, progress):
                return
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError):
            if attempt == _ATTEMPTS - 1:
                raise
    raise ConnectionError(f"the transfer stopped {_ATTEMPTS} times before its end")


def _transfer(url: str, part: Path, progress: Progress) -> bool:
    """Append to the part what is missing; return whether it is complete now."""
    if urlsplit(url).scheme not in {"http", "https"}:
        raise urllib.error.URLError(f"{url} is neither http nor https")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})  # noqa: S310  # checked above
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:  # noqa: S310  # checked above
            resumed = response.status == _PARTIAL_CONTENT
            have = have if resumed else 0
            length = response.headers.get("Content-Length")
            total = have + int(length) if length is not None else None
            with part.open("ab" if resumed else "wb") as file:
                while chunk := response.read(_CHUNK_BYTES):
                    if have + len(chunk) > _MAX_BYTES:
                        raise urllib.error.URLError(f"more than {_MAX_BYTES} bytes, no file here is that large")
                    file.write(chunk)
                    have += len(chunk)
                    progress(part.name.split(".gz")[0], have, total)
    except urllib.error.HTTPError as error:
        if error.code != _RANGE_NOT_SATISFIABLE:
            raise
        return True  # The part is already whole, or longer: the digest decides.
    return total is None or have >= total


def _ignore(name: str, done: int, total: int | None) -> None:
    """Report to nobody."""
