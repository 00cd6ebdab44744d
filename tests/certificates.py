"""Authorities, certificates and keys for tests, made on the spot: nothing secret is checked in."""

import datetime as dt
import ipaddress
from pathlib import Path
from typing import NamedTuple, Self

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


class Certificate(NamedTuple):
    """A certificate and its key, in PEM."""

    certificate: bytes
    private_key: bytes

    @property
    def serial(self) -> int:
        """Its serial number."""
        return x509.load_pem_x509_certificate(self.certificate).serial_number

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Write both files; return their paths."""
        certificate, private_key = folder / f"{name}.crt", folder / f"{name}.key"
        certificate.write_bytes(self.certificate)
        private_key.write_bytes(self.private_key)
        return certificate, private_key


class Authority:
    """Signs certificates."""

    def __init__(self, name: str = "test authority") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = _builder(self._name, self._name, self._key.public_key(), days=30)
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        self._certificate = builder.add_extension(constraints, critical=True).sign(self._key, hashes.SHA256())

    @property
    def certificate(self) -> bytes:
        """Its own certificate, PEM."""
        return self._certificate.public_bytes(Encoding.PEM)

    def issue(
        self, common_name: str = "localhost", *, days: float = 30, begins_in_days: float = -1
    ) -> Certificate:
        """Return a certificate for a name, and for loopback addresses, that ends in some days."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else []
        builder = _builder(
            x509.Name(names), self._name, key.public_key(), days=days, begins_in_days=begins_in_days
        )
        hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return Certificate(certificate.public_bytes(Encoding.PEM), pem)

    def trust(self, own: Certificate | None = None) -> grpc.ChannelCredentials:
        """Return credentials of a client that trusts this authority and shows its own certificate, or none."""
        if own is None:
            return grpc.ssl_channel_credentials(self.certificate)
        return grpc.ssl_channel_credentials(self.certificate, own.private_key, own.certificate)


class ServerFiles(NamedTuple):
    """Files as a configuration of TLS names them."""

    certificate: Path
    private_key: Path
    client_ca: Path

    @classmethod
    def write(cls, folder: Path, pair: Certificate, clients: Authority) -> Self:
        """Write a pair, and the authority of the clients."""
        client_ca = folder / "clients.crt"
        client_ca.write_bytes(clients.certificate)
        return cls(*pair.write(folder, "server"), client_ca)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    *,
    days: float,
    begins_in_days: float = -1,
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    begin = min(begins_in_days, days - 1)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + dt.timedelta(days=begin))
        .not_valid_after(now + dt.timedelta(days=days))
    )
