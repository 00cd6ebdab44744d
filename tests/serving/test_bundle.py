"""A bundle is read whole and true, or refused by name."""

import contextlib
import functools
import hashlib
import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from serving import bundle
from serving.bundle import Bundle
from serving.errors import BundleError
from tests.bundles import LikelihoodName, small_bundle

FILES = ("encoder.onnx", "decoder.onnx", "manifest.json")


@pytest.fixture
def folder(bundle_dir: Path, tmp_path: Path) -> Path:
    """Return a copy of the small bundle that a test may damage."""
    return Path(shutil.copytree(bundle_dir, tmp_path / "bundle"))


def _edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / bundle.MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@contextlib.contextmanager
def _http(handler: Callable[..., http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class QuietFiles(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and says nothing."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Say nothing."""


class Refusing(QuietFiles):
    """Refuses every request."""

    code = 403

    def do_GET(self) -> None:
        """Refuse."""
        self.send_error(self.code)

    def do_HEAD(self) -> None:
        """Refuse."""
        self.send_error(self.code)


def test_what_is_written_is_read(folder: Path, small: Bundle) -> None:
    """Manifest and both graphs come back as they went."""
    assert bundle.read(str(folder)) == small
    assert bundle.Manifest.parse(json.loads(small.manifest.to_json())) == small.manifest


def test_a_manifest_from_before_other_likelihoods_is_read(folder: Path, small: Bundle) -> None:
    """A Bernoulli's manifest has the keys that it always had: old bundles load here, and new ones there."""
    written = json.loads((folder / bundle.MANIFEST).read_text())
    assert "num_levels" not in written
    assert written["likelihood"] == "bernoulli"
    _edit(folder, lambda manifest: manifest.pop("likelihood"))
    assert bundle.read(str(folder)) == small


@pytest.mark.parametrize(("likelihood", "num_levels"), [("gaussian", None), ("categorical", 5)])
def test_other_likelihoods_come_back_as_they_went(
    likelihood: LikelihoodName, num_levels: int | None, tmp_path: Path
) -> None:
    """Family and levels are part of the manifest, and are read as they were written."""
    folder = small_bundle(tmp_path / "b", likelihood=likelihood, num_levels=num_levels)
    manifest = bundle.read(str(folder)).manifest
    assert (manifest.likelihood, manifest.num_levels) == (likelihood, num_levels)


def test_the_version_is_a_digest_of_both_graphs(small: Bundle) -> None:
    """Each graph, and their order, decides the version."""
    encoder, decoder = small.encoder, small.decoder
    versions = {
        bundle.version_of(*graphs) for graphs in [(encoder, decoder), (decoder, encoder), (encoder, encoder)]
    }
    assert len(versions) == 3
    assert small.manifest.version in versions


@pytest.mark.parametrize("name", ["encoder.onnx", "decoder.onnx"])
@pytest.mark.parametrize("where", [0, 0.5, -1])
def test_a_flipped_byte_is_refused(folder: Path, name: str, where: float) -> None:
    """One bit anywhere in a graph is found, and the file is named."""
    content = bytearray((folder / name).read_bytes())
    content[int(where * len(content)) if where >= 0 else -1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(
        BundleError, match=rf"{name} has SHA-256 [0-9a-f]{{64}}, the manifest states .*copy the bundle"
    ):
        bundle.read(str(folder))


@pytest.mark.parametrize("name", ["encoder.onnx", "decoder.onnx"])
@pytest.mark.parametrize("change", [-1, -100, 1])
def test_a_file_of_another_size_is_refused(folder: Path, name: str, change: int) -> None:
    """A truncated or an extended graph is named with both sizes."""
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:change] if change < 0 else content + b"x" * change)
    with pytest.raises(
        BundleError, match=rf"{name} has {len(content) + change} bytes, the manifest states {len(content)}"
    ):
        bundle.read(str(folder))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    """The error says which file is not there and what to give instead."""
    (folder / name).unlink()
    with pytest.raises(BundleError, match=rf"there is no {name}; give the folder that vae-train export wrote"):
        bundle.read(str(folder))


def test_swapped_graphs_are_refused(folder: Path) -> None:
    """The encoder in the decoder's file, and the other way round, do not pass."""
    encoder, decoder = folder / "encoder.onnx", folder / "decoder.onnx"
    encoder.rename(folder / "x")
    decoder.rename(encoder)
    (folder / "x").rename(decoder)
    with pytest.raises(BundleError, match=r"encoder\.onnx has .*the manifest states"):
        bundle.read(str(folder))


def test_graphs_swapped_in_the_manifest_are_refused(folder: Path) -> None:
    """Right digests under the wrong names make another version."""

    def swap(manifest: dict[str, Any]) -> None:
        manifest["encoder"], manifest["decoder"] = manifest["decoder"], manifest["encoder"]

    _edit(folder, swap)
    with pytest.raises(BundleError, match=r"states version [0-9a-f]{12}, its graphs make another"):
        bundle.read(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["encoder"].update(path="../encoder.onnx"), r"encoder\.path"),
        (lambda m: m["encoder"].update(path="/etc/passwd"), r"encoder\.path"),
        (lambda m: m["encoder"].update(path="a/b.onnx"), r"encoder\.path"),
        (lambda m: m["encoder"].update(path="encoder.onnx\n"), r"encoder\.path"),
        (lambda m: m["encoder"].update(sha256="0"), r"encoder\.sha256"),
        (lambda m: m["encoder"].update(size_bytes=0), r"encoder\.size_bytes"),
        (lambda m: m["encoder"].update(size_bytes=2**31), r"encoder\.size_bytes"),
        (lambda m: m["encoder"].update(inputs=[]), r"encoder\.inputs"),
        (lambda m: m.update(surprise=1), r"surprise: Extra inputs are not permitted"),
        (lambda m: m.update(format_version=2), "format_version"),
        (lambda m: m.update(version="ABC"), "version"),
        (lambda m: m.update(name="a b"), "name"),
        (lambda m: m.update(data_shape=[]), "data_shape"),
        (lambda m: m.update(data_shape=[1, -4, 4]), "data_shape"),
        (lambda m: m.update(data_shape=[0]), "data_shape"),
        (lambda m: m.update(data_shape=[10**6, 10**6]), "data_shape"),
        (lambda m: m.update(latent_dim=0), "latent_dim"),
        (lambda m: m.update(prior="laplace"), "prior"),
        (lambda m: m.update(likelihood="laplace"), "likelihood"),
        (lambda m: m.update(likelihood="categorical"), "num_levels is for a categorical likelihood"),
        (lambda m: m.update(num_levels=16), "num_levels is for a categorical likelihood, which needs it"),
        (lambda m: m.update(likelihood="categorical", num_levels=1), "num_levels"),
        (lambda m: m.update(likelihood="categorical", num_levels=257), "num_levels"),
        (
            lambda m: m.update(likelihood="categorical", num_levels=256, data_shape=[2**17]),
            "at most 16777216 elements",
        ),
        (lambda m: m.pop("golden"), "golden: Field required"),
    ],
)
def test_a_wrong_manifest_is_refused_by_key(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    """Every value that serving relies on has a range, and the error names the key."""
    _edit(folder, change)
    with pytest.raises(BundleError, match=message):
        bundle.read_manifest(str(folder))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'"x"', b"{}", b"[" * 100_000, b'{"a":' * 100_000],
    ids=["empty", "open", "list", "null", "not utf-8", "text", "no keys", "deep list", "deep object"],
)
def test_what_is_no_manifest_is_refused(folder: Path, content: bytes) -> None:
    """Bytes that are no manifest are a BundleError, not a stack."""
    (folder / bundle.MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json is not a valid manifest: .*export it again"):
        bundle.read(str(folder))


def test_a_huge_manifest_is_not_read(folder: Path) -> None:
    """More bytes than a manifest may have are refused, even where they are blank."""
    path = folder / bundle.MANIFEST
    path.write_bytes(path.read_bytes() + b" " * bundle.MAX_MANIFEST_BYTES)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        bundle.read(str(folder))


@pytest.mark.parametrize(
    "name", ["with space", "per%20cent", "ha#sh", "que?ry", "ümlaut", "brackets[1]", "co:lon"]
)
def test_a_folder_may_have_any_name(bundle_dir: Path, tmp_path: Path, small: Bundle, name: str) -> None:
    """Folders are paths, not URLs: no character in their name means something else."""
    folder = shutil.copytree(bundle_dir, tmp_path / name)
    assert bundle.read(str(folder)) == small


def test_a_relative_folder_is_read(bundle_dir: Path, small: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder may be given relative to where one stands; `absolute` makes it mean the same elsewhere."""
    monkeypatch.chdir(bundle_dir.parent)
    assert bundle.read("small") == bundle.read("./small/") == small
    assert bundle.absolute("small") == str(bundle_dir)
    assert bundle.absolute("s3://bucket/small") == "s3://bucket/small"


def test_a_bundle_is_read_from_any_file_system(bundle_dir: Path, small: Bundle) -> None:
    """A URL that fsspec knows does what a folder does."""
    files = fsspec.filesystem("memory")
    for name in FILES:
        files.pipe(f"/bundles/small/{name}", (bundle_dir / name).read_bytes())
    assert bundle.read("memory://bundles/small") == small
    assert bundle.read(bundle_dir.as_uri()) == small
    with pytest.raises(BundleError, match=r"bundle memory://bundles/none: there is no manifest\.json"):
        bundle.read("memory://bundles/none")


def test_a_bundle_is_read_over_http(bundle_dir: Path, small: Bundle) -> None:
    """A web server is as good as a folder, with or without a slash at the end."""
    with _http(functools.partial(QuietFiles, directory=str(bundle_dir.parent))) as url:
        assert bundle.read(f"{url}/small") == small
        assert bundle.read(f"{url}/small/") == small
        with pytest.raises(BundleError, match=r"there is no manifest\.json"):
            bundle.read(f"{url}/none")


@pytest.mark.parametrize("code", [403, 500])
def test_a_web_server_that_refuses_is_an_error_of_one_line(code: int) -> None:
    """A refusal names the address and what to check, not a stack."""
    handler = type("Handler", (Refusing,), {"code": code})
    with _http(handler) as url, pytest.raises(BundleError, match=r"manifest\.json"):
        bundle.read(f"{url}/small")


@pytest.mark.parametrize("location", ["http://127.0.0.1:1/small", "nosuch://bucket/small"])
def test_an_address_that_does_not_answer_is_an_error_of_one_line(location: str) -> None:
    """An unreachable or an unknown address says what to check."""
    with pytest.raises(BundleError, match=r"manifest\.json cannot be read \(\w+: .*check the address"):
        bundle.read(location)


def test_a_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    """A path to a file is not a bundle."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match=r"manifest\.json"):
        bundle.read(str(tmp_path / "file"))


def _write(directory: Path, small: Bundle, extra: dict[str, bytes]) -> None:
    bundle.write(directory, manifest=small.manifest, encoder=small.encoder, decoder=small.decoder, extra=extra)


def test_writing_replaces_an_older_bundle_whole(tmp_path: Path, small: Bundle) -> None:
    """Nothing of the older bundle stays, and nothing lies beside the new one."""
    target = small_bundle(tmp_path / "b", seed=5)
    (target / "old.txt").write_text("old")
    _write(target, small, {"MODEL_CARD.md": b"card", "samples/grid.png": b"png"})
    assert bundle.read(str(target)) == small
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()) == [
        "MODEL_CARD.md",
        "decoder.onnx",
        "encoder.onnx",
        "manifest.json",
        "samples/grid.png",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_failed_write_leaves_the_older_bundle(tmp_path: Path, small: Bundle) -> None:
    """A bundle is written complete or not at all, and what was half written is not left behind."""
    target = small_bundle(tmp_path / "b", seed=5)
    before = bundle.read(str(target))
    with pytest.raises(OSError, match="a"):
        _write(target, small, {"a": b"file", "a/b": b"in a file"})
    assert bundle.read(str(target)) == before
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_write_after_a_failed_one_has_no_strangers(tmp_path: Path, small: Bundle) -> None:
    """Files of a write that failed do not appear in the next bundle."""
    target = tmp_path / "b"
    with pytest.raises(OSError, match="a"):
        _write(target, small, {"a": b"file", "a/b": b"in a file"})
    _write(target, small, {})
    assert sorted(path.name for path in target.iterdir()) == ["decoder.onnx", "encoder.onnx", "manifest.json"]


def test_a_folder_that_is_no_bundle_is_not_replaced(tmp_path: Path, small: Bundle) -> None:
    """Somebody's documents are safe from a wrong --out."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(BundleError, match="it exists and is not a bundle; name another folder"):
        _write(tmp_path / "thesis", small, {})
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "x"


def test_an_empty_folder_may_become_a_bundle(tmp_path: Path, small: Bundle) -> None:
    """A folder that was made beforehand is used, and so is one deep below nothing."""
    (tmp_path / "made").mkdir()
    for name in ("made", "deep/down/here"):
        _write(tmp_path / name, small, {})
        assert bundle.read(str(tmp_path / name)) == small


def test_a_file_is_not_replaced_by_a_bundle(tmp_path: Path, small: Bundle) -> None:
    """A file under the name of the folder is refused like a folder that is no bundle."""
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(BundleError, match="name another folder"):
        _write(tmp_path / "notes.txt", small, {})


def test_only_the_bundle_that_was_asked_for_is_read(bundle_dir: Path, small: Bundle) -> None:
    """The digest of the manifest stands for all of it, because that holds the digests of the graphs."""
    digest = hashlib.sha256((bundle_dir / bundle.MANIFEST).read_bytes()).hexdigest()
    assert bundle.read(str(bundle_dir), sha256=digest) == small
    with pytest.raises(BundleError, match=r"bundle_sha256 asks for ffff.*bring the bundle that was asked for"):
        bundle.read(str(bundle_dir), sha256="f" * 64)
