"""Downloads against a real HTTP server on this machine: resumed, verified, never half there."""

import gzip
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from training import download
from training.download import RemoteFile, fetch, unpack
from training.errors import DataCorrupt, DataMissing, DownloadFailed

CONTENT = bytes(range(256)) * 40
PACKED = gzip.compress(hashlib.sha512(CONTENT).digest() * 50 + CONTENT, compresslevel=0, mtime=0)
UNPACKED = gzip.decompress(PACKED)
FILE = RemoteFile("images", len(UNPACKED), hashlib.sha256(UNPACKED).hexdigest())


class Mirror(ThreadingHTTPServer):
    """Serves files with Range requests; cuts the first `cuts` transfers in the middle."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], *, cuts: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.cuts = files, cuts
        self.ranges: list[str | None] = []

    @property
    def url(self) -> str:
        """Address that file names are appended to."""
        return f"http://127.0.0.1:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        content = self.server.files.get(self.path.lstrip("/"))
        if content is None:
            self.send_error(404)
            return
        first = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if first >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        if self.server.cuts > 0:
            self.server.cuts -= 1
            self.wfile.write(content[first : first + (len(content) - first) // 2])
            return
        self.wfile.write(content[first:])

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, ANN401
        """Say nothing."""


@pytest.fixture
def mirrors(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Mirror]]:
    """Return a list; servers put into it by `_start` are stopped at the end."""
    monkeypatch.setattr(download, "_PAUSE_S", 0.01)
    started: list[Mirror] = []
    yield started
    for mirror in started:
        mirror.shutdown()
        mirror.server_close()


def _start(mirrors: list[Mirror], content: bytes | None, *, cuts: int = 0) -> Mirror:
    mirror = Mirror({} if content is None else {"images.gz": content}, cuts=cuts)
    threading.Thread(target=mirror.serve_forever, args=(0.01,), daemon=True).start()
    mirrors.append(mirror)
    return mirror


def test_file_arrives_under_its_name(mirrors: list[Mirror], tmp_path: Path) -> None:
    """The packed file is there, its content is verified, nothing else is left."""
    path = fetch(FILE, tmp_path / "new", [_start(mirrors, PACKED).url])
    assert unpack(path, FILE) == UNPACKED
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["images.gz"]


def test_progress_counts_bytes(mirrors: list[Mirror], tmp_path: Path) -> None:
    """The listener sees the name, rising counts and the size."""
    seen: list[tuple[str, int, int | None]] = []
    fetch(FILE, tmp_path, [_start(mirrors, PACKED).url], progress=lambda *event: seen.append(event))
    assert seen[-1] == ("images", len(PACKED), len(PACKED))


def test_cut_transfer_is_continued(mirrors: list[Mirror], tmp_path: Path) -> None:
    """After a cut only the missing bytes are asked for."""
    mirror = _start(mirrors, PACKED, cuts=1)
    fetch(FILE, tmp_path, [mirror.url])
    assert mirror.ranges == [None, f"bytes={len(PACKED) // 2}-"]


def test_part_of_an_earlier_process_is_continued(mirrors: list[Mirror], tmp_path: Path) -> None:
    """What an interrupted attempt left is used by the next."""
    mirror = _start(mirrors, PACKED, cuts=3)
    with pytest.raises(DownloadFailed, match="stopped 3 times before its end"):
        fetch(FILE, tmp_path, [mirror.url])
    (part,) = tmp_path.iterdir()
    size = part.stat().st_size
    fetch(FILE, tmp_path, [mirror.url])
    assert mirror.ranges[-1] == f"bytes={size}-"
    assert [file.name for file in tmp_path.iterdir()] == ["images.gz"]


def test_complete_part_needs_no_more_bytes(mirrors: list[Mirror], tmp_path: Path) -> None:
    """A process that ended between the last byte and the renaming costs nothing."""
    mirror = _start(mirrors, PACKED)
    path = fetch(FILE, tmp_path, [mirror.url])
    path.rename(download._part(path, mirror.url))  # noqa: SLF001  # the situation cannot be made otherwise
    assert unpack(fetch(FILE, tmp_path, [mirror.url]), FILE) == UNPACKED


def test_next_mirror_is_tried(mirrors: list[Mirror], tmp_path: Path) -> None:
    """Neither an absent file, nor a wrong one, nor a dead server stops the download."""
    absent, wrong, right = (_start(mirrors, content) for content in (None, gzip.compress(b"wrong"), PACKED))
    dead = "http://127.0.0.1:9/"
    path = fetch(FILE, tmp_path, [dead, absent.url, wrong.url, right.url])
    assert unpack(path, FILE) == UNPACKED


@pytest.mark.parametrize(
    "content", [gzip.compress(b"wrong"), b"\x1f\x8bnot gzip at all", PACKED[:-200], gzip.compress(UNPACKED + b"x")]
)
def test_wrong_content_is_refused_with_both_digests(content: bytes, mirrors: list[Mirror], tmp_path: Path) -> None:
    """Nothing is left of a file that is not the official one."""
    with pytest.raises(DataCorrupt, match=rf"images: .* SHA-256 [0-9a-f]{{64}}, expected {FILE.sha256}"):
        fetch(FILE, tmp_path, [_start(mirrors, content).url])
    assert list(tmp_path.iterdir()) == []


def test_no_mirror_at_all_is_explained(mirrors: list[Mirror], tmp_path: Path) -> None:
    """The error names every mirror with its reason, and the way out."""
    mirror = _start(mirrors, None)
    with pytest.raises(DownloadFailed, match=r"127\.0\.0\.1.*404.*--data-dir"):
        fetch(FILE, tmp_path, [mirror.url])


def test_other_schemes_are_refused(tmp_path: Path) -> None:
    """A mirror cannot make us read a local file."""
    with pytest.raises(DownloadFailed, match="neither http nor https"):
        fetch(FILE, tmp_path, ["file:///etc/"])


def test_folder_that_cannot_be_made_is_explained(mirrors: list[Mirror], tmp_path: Path) -> None:
    """The error names the folder and the reason."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataMissing, match=r"cannot be written to .*file"):
        fetch(FILE, tmp_path / "file" / "folder", [_start(mirrors, PACKED).url])
