"""TLS: certificates that are read again when they change, and no plaintext that leaves the machine."""

import ipaddress
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final, NamedTuple

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from serving.config import GatewayConfig, TlsConfig
from serving.errors import CredentialsError
from serving.watched import Watched

logger = logging.getLogger(__name__)

_WARN_DAYS: Final = 14
"""Days before the end of a certificate from which each day brings a warning."""

MIN_RSA_BITS: Final = 2048


class _Certificates(NamedTuple):
    configuration: grpc.ServerCertificateConfiguration
    serial: str
    not_after: datetime


def server_credentials(tls: TlsConfig) -> grpc.ServerCredentials | None:
    """Return what the server's port needs to speak TLS; None means plaintext.

    The files are looked at for every connection and read when they changed. What is not fit then, such as a
    certificate whose key has not been written yet, is logged and ignored: the old pair stays in use.

    Raises:
        CredentialsError: If a file cannot be read, does not parse or has expired, or the key is of another
            certificate.
    """
    if not tls.certificate:
        return None
    pair = _Pair(tls)
    return grpc.dynamic_ssl_server_credentials(
        pair.current.configuration,
        pair.changed,  # type: ignore[arg-type]  # None is allowed, whatever the stubs say
        require_client_authentication=bool(tls.client_ca),
    )


def check_plaintext(host: str, gateway: GatewayConfig) -> None:
    """Refuse to speak plaintext where others could listen.

    Raises:
        CredentialsError: If the address is not loopback, there is no certificate, and plaintext is not allowed.
    """
    if gateway.tls.certificate or gateway.allow_plaintext or host.startswith("unix:") or is_loopback(host):
        return
    raise CredentialsError(
        source=f"gateway.host {host!r}",
        problem="plaintext would leave this machine; set gateway.tls.certificate and gateway.tls.private_key, "
        "or gateway.allow_plaintext=true where a mesh or a proxy in front secures the transport",
    )


def is_loopback(host: str) -> bool:
    """Return whether a host can only be this machine. Names other than localhost are not looked up."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host == "localhost"
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


class _Pair:
    """The certificate and its key, as they are now."""

    def __init__(self, tls: TlsConfig) -> None:
        self._file = tls.certificate
        self._watched = Watched(
            [path for path in (tls.certificate, tls.private_key, tls.client_ca) if path], _parse
        )
        self._warned_days: int | None = None
        self._tell_loaded()

    @property
    def current(self) -> _Certificates:
        """The pair in use."""
        return self._watched.value

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return a new configuration, or None if nothing changed. gRPC asks before every handshake."""
        try:
            if self._watched.refresh():
                self._tell_loaded()
                return self.current.configuration
            self._tell_if_ending()
        except Exception:
            logger.exception("certificate not refreshed, the old one stays in use")
        return None

    def _tell_loaded(self) -> None:
        facts = {"file": self._file, "serial": self.current.serial, "days_left": self._days_left()}
        logger.info("certificate loaded", extra=facts)
        self._tell_if_ending()

    def _tell_if_ending(self) -> None:
        days_left = self._days_left()
        if days_left < _WARN_DAYS and days_left != self._warned_days:
            self._warned_days = days_left
            logger.warning("certificate ends soon", extra={"file": self._file, "days_left": days_left})

    def _days_left(self) -> int:
        return (self.current.not_after - datetime.now(UTC)).days


def _parse(certificate: bytes, private_key: bytes, client_ca: bytes | None = None) -> _Certificates:
    """Return what was read, if it fits together.

    Raises:
        ValueError: If it does not; the text names the setting, and holds nothing of the contents.
    """
    leaf = _certificates("certificate", certificate)[0]
    now = datetime.now(UTC)
    if leaf.not_valid_after_utc <= now:
        raise ValueError(f"certificate: ended on {leaf.not_valid_after_utc:%Y-%m-%d}; renew it")
    if leaf.not_valid_before_utc > now:
        raise ValueError(
            f"certificate: begins on {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; wait or renew it"
        )
    try:
        key = load_pem_private_key(private_key, password=None)
    except TypeError:
        raise ValueError("private_key: is encrypted; write it without a passphrase") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("private_key: is not a private key in PEM; write one") from None
    if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
        raise ValueError("private_key: expected an RSA or an elliptic curve key; others are not widely understood")  # noqa: TRY004 - one class for all that is wrong in a file
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size < MIN_RSA_BITS:
        raise ValueError(f"private_key: RSA keys need {MIN_RSA_BITS} bits or more; make a longer one")
    subject_key = leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) != subject_key:
        raise ValueError("private_key: belongs to another certificate; name the files of one pair")
    if client_ca is not None:
        _certificates("client_ca", client_ca)
    configuration = grpc.ssl_server_certificate_configuration([(private_key, certificate)], client_ca)
    return _Certificates(configuration, f"{leaf.serial_number:x}", leaf.not_valid_after_utc)


def _certificates(setting: str, content: bytes) -> Sequence[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(content)
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError(f"{setting}: is not a certificate in PEM; write one") from None
