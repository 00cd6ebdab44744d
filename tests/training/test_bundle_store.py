"""Published bundles are written once, and the pointer is always whole: on a file system and on an object store."""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from typer.testing import CliRunner

from serving import bundle
from serving.errors import BundleError
from tests.bundles import small_bundle
from training import bundle_store
from training.bundle_store import Pointer
from training.cli import app


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a bundle; do not write into it."""
    return small_bundle(tmp_path_factory.mktemp("first") / "bundle", seed=1)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of another version of the same model; do not write into it."""
    return small_bundle(tmp_path_factory.mktemp("second") / "bundle", seed=2)


@pytest.fixture(params=["folder", "objects"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Return an empty store: on a file system, and on what behaves as an object store does."""
    if request.param == "folder":
        yield str(tmp_path / "store")
        return
    yield "memory://store"
    fsspec.filesystem("memory").store.clear()


def _files(store: str) -> dict[str, bytes]:
    """Return the content of every file of a store by its path."""
    files, path = fsspec.core.url_to_fs(store)
    return {name.removeprefix(path): files.cat_file(name) for name in files.find(path)}


def _pointer(store: str) -> Pointer:
    with fsspec.open(f"{store}/small/current.json") as file:
        return Pointer.model_validate_json(file.read())


def test_what_is_published_is_what_was_exported(first: Path, store: str) -> None:
    """Every file, below name and version, readable as the service reads it."""
    published = bundle_store.publish(first, store)
    version = bundle.read_manifest(str(first)).version
    assert published.is_new
    assert published.location == f"{store}/small/{version}"
    assert bundle.read(published.location) == bundle.read(str(first))
    expected = {f"/small/{version}/{file.name}": file.read_bytes() for file in first.iterdir()}
    assert _files(store) == expected


def test_a_version_is_written_once(first: Path, store: str, tmp_path: Path) -> None:
    """A job that is repeated changes nothing, whatever else it brings beside the same graphs."""
    bundle_store.publish(first, store)
    before = _files(store)
    again = tmp_path / "again"
    shutil.copytree(first, again)
    (again / bundle.MODEL_CARD).write_text("another card")
    assert not bundle_store.publish(again, store).is_new
    assert _files(store) == before


def test_what_is_damaged_in_the_store_is_said_and_not_mended(first: Path, store: str) -> None:
    """Somebody may be serving from there; a person has to look."""
    location = bundle_store.publish(first, store).location
    files, path = fsspec.core.url_to_fs(location)
    files.pipe_file(f"{path}/encoder.onnx", b"damaged")
    before = _files(store)
    with pytest.raises(BundleError, match=r"encoder\.onnx has 7 bytes"):
        bundle_store.publish(first, store)
    assert _files(store) == before


def test_an_upload_that_broke_off_is_no_bundle_and_is_completed(first: Path, store: str) -> None:
    """The manifest comes last on an object store; on a file system the folder gets its name last."""
    location = bundle_store.publish(first, store).location
    files, path = fsspec.core.url_to_fs(location)
    for name in files.find(path):
        if store.startswith("memory") and name.endswith("encoder.onnx"):
            continue  # what an upload leaves
        files.rm_file(name)
    with pytest.raises(BundleError, match=r"there is no manifest\.json"):
        bundle.read(location)
    assert bundle_store.publish(first, store).is_new
    assert bundle.read(location) == bundle.read(str(first))


def test_a_folder_that_holds_something_else_stays(first: Path, tmp_path: Path) -> None:
    """Nothing is published over files that nobody explains."""
    version = bundle.read_manifest(str(first)).version
    stranger = tmp_path / "small" / version / "notes.txt"
    stranger.parent.mkdir(parents=True)
    stranger.write_text("mine")
    with pytest.raises(BundleError, match="it cannot be written"):
        bundle_store.publish(first, str(tmp_path))
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [stranger]


def test_the_pointer_names_what_was_promoted_and_the_way_back(first: Path, second: Path, store: str) -> None:
    """Forward, repeated, and back again."""
    old, new = (bundle_store.publish(folder, store) for folder in (first, second))
    assert bundle_store.promote(old.location).previous is None
    bundle_store.promote(new.location)
    assert bundle_store.promote(new.location).previous == old.manifest.version  # repeated: the way back stays
    pointer = _pointer(store)
    assert (pointer.version, pointer.path) == (new.manifest.version, f"small/{new.manifest.version}")
    manifest = _files(store)[f"/{pointer.path}/{bundle.MANIFEST}"]
    assert pointer.bundle_sha256 == new.bundle_sha256 == hashlib.sha256(manifest).hexdigest()
    assert bundle_store.promote(f"{store}/small/{pointer.previous}").version == old.manifest.version
    assert _pointer(store).previous == new.manifest.version


def test_a_damaged_bundle_is_not_promoted(first: Path, second: Path, store: str) -> None:
    """The pointer stays on what can be served."""
    good, bad = (bundle_store.publish(folder, store).location for folder in (first, second))
    bundle_store.promote(good)
    files, path = fsspec.core.url_to_fs(bad)
    files.rm_file(f"{path}/decoder.onnx")
    with pytest.raises(BundleError, match=r"there is no decoder\.onnx"):
        bundle_store.promote(bad)
    assert f"{store}/{_pointer(store).path}" == good


def test_what_was_not_published_is_not_promoted(first: Path) -> None:
    """A folder that an export may replace is not for a pointer."""
    with pytest.raises(BundleError, match="publish it with vae-train publish"):
        bundle_store.promote(str(first))
    assert not (first.parent.parent / bundle_store.POINTER).exists()


def test_readers_of_the_pointer_never_see_a_part_of_it(first: Path, second: Path, tmp_path: Path) -> None:
    """While it moves, it names the one version or the other, as a whole."""
    locations = [bundle_store.publish(folder, str(tmp_path)).location for folder in (first, second)]
    bundle_store.promote(locations[0])
    stop = threading.Event()

    def move() -> None:
        while not stop.is_set():
            for location in locations:
                bundle_store.promote(location)

    mover = threading.Thread(target=move)
    mover.start()
    try:
        seen = {_pointer(str(tmp_path)).path for _ in range(500)}
    finally:
        stop.set()
        mover.join()
    assert {f"{tmp_path}/{path}" for path in seen} <= set(locations)
    assert [file.name for file in (tmp_path / "small").iterdir() if file.is_file()] == [bundle_store.POINTER]


@pytest.mark.parametrize("store", ["nosuch://store", "/proc/store"])
def test_a_store_that_cannot_be_written_is_named(first: Path, store: str) -> None:
    """One error with the address, whatever the file system raised."""
    with pytest.raises(BundleError, match=f"{store}/small.* cannot be written"):
        bundle_store.publish(first, store)


def test_commands_publish_promote_and_print_what_a_deployment_needs(first: Path, tmp_path: Path) -> None:
    """Location, version and digests, for a person and as JSON."""
    store, manifest = str(tmp_path / "store"), bundle.read_manifest(str(first))
    location = f"{store}/small/{manifest.version}"
    digest = hashlib.sha256((first / bundle.MANIFEST).read_bytes()).hexdigest()
    run = CliRunner().invoke
    expected = f"bundle: {location}\nbundle_sha256: {digest}\n"
    assert run(app, ["publish", str(first), store]).stdout == expected
    assert run(app, ["promote", location]).stdout == expected
    facts = json.loads(run(app, ["publish", str(first), store, "--json"]).stdout)
    assert facts == {
        "bundle": location,
        "bundle_sha256": digest,
        "name": "small",
        "version": manifest.version,
        "is_new": False,
    }
    facts = json.loads(run(app, ["publish", str(first), store, "--promote", "--json"]).stdout)
    assert (facts["bundle"], facts["bundle_sha256"], facts["previous"]) == (location, digest, None)
