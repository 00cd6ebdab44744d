"""Transport security inside the cluster: the certificates that Ray's own connections use."""

import os
import ssl
from collections.abc import Mapping
from typing import NamedTuple, Self


class Security(NamedTuple):
    """Files of mutual TLS; plaintext without them."""

    certificate: str = ""
    private_key: str = ""
    ca: str = ""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Return what Ray's variables say: RAY_USE_TLS and RAY_TLS_{SERVER_CERT,SERVER_KEY,CA_CERT}."""
        if environ.get("RAY_USE_TLS", "0").lower() not in {"1", "true"}:
            return cls()
        names = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
        return cls(*(environ.get(name, "") for name in names))

    def server_context(self) -> ssl.SSLContext | None:
        """Return what a server shows and demands; None for plaintext."""
        return self._context(ssl.Purpose.CLIENT_AUTH)

    def client_context(self) -> ssl.SSLContext | None:
        """Return what a caller shows and demands; None for plaintext."""
        return self._context(ssl.Purpose.SERVER_AUTH)

    def _context(self, purpose: ssl.Purpose) -> ssl.SSLContext | None:
        if not self.certificate:
            return None
        context = ssl.create_default_context(purpose, cafile=self.ca)
        context.load_cert_chain(self.certificate, self.private_key)
        context.verify_mode = ssl.CERT_REQUIRED
        return context
