"""`vae-serve fetch`: bring a bundle into a folder, verified; what an init container of a pod does."""

from pathlib import Path
from typing import Annotated

import typer

from serving import bundle
from serving.typed_config import ConfigError


def fetch(
    *,
    url: Annotated[str, typer.Option(envvar="VAE_BUNDLE_URL", help="Folder or URL of the bundle.")],
    to: Annotated[Path, typer.Option(help="Folder to write, replaced as a whole.")],
    sha256: Annotated[str, typer.Option(envvar="VAE_BUNDLE_SHA256", help="SHA-256 that its manifest.json has.")],
) -> None:
    """Bring a bundle into a folder. Nothing is written unless every byte is the one that was asked for."""
    if len(sha256) != bundle.SHA256_DIGITS or not set(sha256) <= set("0123456789abcdef"):
        raise ConfigError(f"--sha256 {sha256!r}: expected the 64 digits that `sha256sum manifest.json` prints")
    found = bundle.read(url, sha256=sha256)
    bundle.write(to, manifest=found.manifest, encoder=found.encoder, decoder=found.decoder, extra={})
    typer.echo(f"{to}: {found.manifest.name} {found.manifest.version}")
