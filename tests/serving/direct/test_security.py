"""Transport security inside the cluster follows Ray's own variables."""

import ssl
from pathlib import Path

from serving.direct.security import Security
from tests.certificates import Authority


def test_without_rays_tls_there_is_none() -> None:
    """Plaintext unless RAY_USE_TLS says otherwise, as Ray's own connections are."""
    assert Security.from_environment({}) == Security()
    assert Security.from_environment({"RAY_USE_TLS": "0", "RAY_TLS_SERVER_CERT": "a"}) == Security()
    assert Security().server_context() is None
    assert Security().client_context() is None


def test_rays_certificates_are_used_both_ways(tmp_path: Path) -> None:
    """With RAY_USE_TLS both ends show a certificate and demand one."""
    security = tls(tmp_path)
    for context in (security.server_context(), security.client_context()):
        assert context is not None
        assert context.verify_mode is ssl.CERT_REQUIRED


def tls(folder: Path, authority: Authority | None = None) -> Security:
    """Return the security of a member of the cluster, as Ray's variables describe it."""
    authority = authority or Authority()
    certificate, key = authority.issue("replica").write(folder, "replica")
    (folder / "ca.crt").write_bytes(authority.certificate)
    environ = {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(certificate),
        "RAY_TLS_SERVER_KEY": str(key),
        "RAY_TLS_CA_CERT": str(folder / "ca.crt"),
    }
    return Security.from_environment(environ)
