"""Where bundles wait to be served: a folder for each version that is written once, and a pointer to one of them.

```
STORE/NAME/VERSION/manifest.json, encoder.onnx, ...   what `vae-serve up --bundle` takes
STORE/NAME/current.json                               which of them is meant to be served
```

A version is the digest of its graphs, so a service that was given STORE/NAME/VERSION serves the same model after
any restart. The pointer is for whoever writes the deployment. Nothing that serves follows it: replicas that start
at different moments would serve two models.
"""

import hashlib
import os
import secrets
import shutil
from pathlib import Path
from typing import Any, Final, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pydantic import Field

from serving import bundle
from serving.bundle import Manifest
from serving.errors import BundleError
from serving.typed_config import Config

POINTER: Final = "current.json"


class Published(NamedTuple):
    """A bundle in a store."""

    location: str
    """Folder or URL, for `vae-serve up --bundle`."""

    manifest: Manifest
    bundle_sha256: str
    """SHA-256 of the manifest's file."""

    is_new: bool
    """Whether it was written now; false if it was there."""


class Pointer(Config):
    """Which version of a model is meant to be served."""

    name: str
    """Name of the model."""

    version: str
    """Its version."""

    path: str
    """Folder of the bundle below the store, which need not be mounted at one place everywhere."""

    bundle_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of its manifest, which holds those of its graphs: what a deployment insists on."""

    previous: str | None = None
    """Version that the pointer named before: the way back."""


def publish(directory: Path, store: str) -> Published:
    """Copy a bundle into a store, unless it is there.

    Args:
        directory: Folder of the bundle.
        store: Folder or URL that fsspec can write to.

    Raises:
        BundleError: If the bundle or what the store holds in its place is damaged, or the store cannot be written.
    """
    manifest = bundle.read(str(directory)).manifest
    model = f"{bundle.absolute(store).rstrip('/')}/{manifest.name}"
    location = f"{model}/{manifest.version}"
    files, path = _opened(location)
    try:
        is_new = not files.exists(f"{path}/{bundle.MANIFEST}")
        if is_new:
            _copy(directory, files, path)
    except OSError as error:
        raise _unwritable(location, error) from None
    stored = bundle.read(location).manifest
    return Published(location, stored, _digest(files, path), is_new)


def promote(location: str) -> Pointer:
    """Make the pointer of a model name a published bundle, in one step. Also the way back to an older one.

    Args:
        location: Folder or URL of the bundle in its store.

    Raises:
        BundleError: If it is damaged, not where `publish` puts it, or the pointer cannot be written. The pointer
            then stays.
    """
    location = bundle.absolute(location).rstrip("/")
    manifest = bundle.read(location).manifest
    own_path = f"{manifest.name}/{manifest.version}"
    if not location.endswith(f"/{own_path}"):
        problem = f"it is {manifest.name} {manifest.version}, and its folder is not called {own_path}"
        raise BundleError(location=location, problem=problem, remedy="publish it with vae-train publish")
    files, path = _opened(location)
    file = f"{path.removesuffix(manifest.version)}{POINTER}"
    try:
        before = Pointer.model_validate_json(files.cat_file(file)) if files.exists(file) else None
        pointer = Pointer(
            name=manifest.name,
            version=manifest.version,
            path=own_path,
            bundle_sha256=_digest(files, path),
            previous=_previous(before, manifest.version),
        )
        _replace(files, file, (pointer.model_dump_json(indent=2) + "\n").encode())
    except (OSError, ValueError) as error:
        raise _unwritable(location.removesuffix(manifest.version) + POINTER, error) from None
    return pointer


def _digest(files: Any, path: str) -> str:  # noqa: ANN401 - fsspec has no types
    """Return the SHA-256 of a stored manifest's bytes."""
    return hashlib.sha256(files.cat_file(f"{path}/{bundle.MANIFEST}")).hexdigest()


def _previous(before: Pointer | None, version: str) -> str | None:
    """Return the way back; promoting the current version once more, as a job that is repeated does, keeps it."""
    if before is None:
        return None
    return before.previous if before.version == version else before.version


def _opened(location: str) -> tuple[Any, str]:
    try:
        files, path = fsspec.core.url_to_fs(location)
    except (ValueError, ImportError, OSError) as error:
        raise _unwritable(location, error) from None
    return files, str(path)


def _copy(directory: Path, files: Any, path: str) -> None:  # noqa: ANN401 - fsspec has no types
    """Copy a bundle so that it is whole as soon as it has a manifest."""
    if isinstance(files, LocalFileSystem):
        _copy_locally(directory, Path(path))
        return
    relative = sorted(file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file())
    for name in sorted(relative, key=lambda name: name == bundle.MANIFEST):  # the manifest last
        files.pipe_file(f"{path}/{name}", (directory / name).read_bytes())


def _copy_locally(directory: Path, target: Path) -> None:
    # Not the process's number: the first process of every container has the same.
    partial = target.with_name(f".{target.name}.{secrets.token_hex(8)}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copytree(directory, partial)
        for file in partial.rglob("*"):
            _sync(file)
        partial.rename(target)  # refused where there are files, so that nothing published is ever replaced
    except OSError:
        if not (target / bundle.MANIFEST).exists():  # else somebody else was first with the same version
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(files: Any, path: str, content: bytes) -> None:  # noqa: ANN401 - fsspec has no types
    """Write a file so that readers find the old one or the new one; object stores do so by themselves."""
    if not isinstance(files, LocalFileSystem):
        files.pipe_file(path, content)
        return
    target = Path(path)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(8)}.partial")
    try:
        partial.write_bytes(content)
        _sync(partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Bring a file to the disk before it gets its name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(location: str, error: Exception) -> BundleError:
    problem = f"it cannot be written ({type(error).__name__}: {str(error)[:200]})"
    return BundleError(location=location, problem=problem, remedy="check the address and its permissions")
