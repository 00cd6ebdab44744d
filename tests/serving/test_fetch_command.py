"""A bundle is fetched whole and verified, or not at all."""

import hashlib
import sys
from pathlib import Path

import pytest

from serving import bundle, cli


@pytest.fixture
def digest(bundle_dir: Path) -> str:
    """Return what `sha256sum manifest.json` prints."""
    return hashlib.sha256((bundle_dir / "manifest.json").read_bytes()).hexdigest()


def test_a_bundle_is_fetched(
    bundle_dir: Path, digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an init container does it: where from and what in variables, where to in an option."""
    monkeypatch.setenv("VAE_BUNDLE_URL", bundle_dir.as_uri())
    monkeypatch.setenv("VAE_BUNDLE_SHA256", digest)
    monkeypatch.setattr(sys, "argv", ["vae-serve", "fetch", "--to", str(tmp_path / "vae")])
    assert cli.run() == 0
    assert bundle.read(str(tmp_path / "vae")) == bundle.read(str(bundle_dir))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("0" * 64, "bundle_sha256 asks for 0000"),
        ("replace-with-digest", "expected the 64 digits"),
        ("A" * 64, "64 digits"),
    ],
)
def test_another_bundle_is_refused(
    wanted: str,
    message: str,
    bundle_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing is written then."""
    target = tmp_path / "vae"
    line = ["vae-serve", "fetch", "--url", str(bundle_dir), "--to", str(target), "--sha256", wanted]
    monkeypatch.setattr(sys, "argv", line)
    assert cli.run() == 2
    assert message in capsys.readouterr().err
    assert not target.exists()
