"""TLS over real sockets: who trusts whom, and certificates that change under a running service."""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from protos.vae.v1 import vae_pb2 as pb
from serving.bundle import Bundle
from serving.config import AuthConfig, GatewayConfig, TlsConfig
from serving.errors import CredentialsError
from serving.gateway.credentials import check_plaintext, server_credentials
from serving.gateway.identity import Identity
from tests.certificates import Authority, Certificate, ServerFiles
from tests.serving.harness import PuppetEngine, call, serving_with, settings, wire

PATH = "/test.Who/Am"


@pytest.fixture(scope="module")
def authority() -> Authority:
    """Return who signs the server's certificates."""
    return Authority()


@pytest.fixture(scope="module")
def clients() -> Authority:
    """Return who signs the clients' certificates."""
    return Authority("clients")


@pytest.fixture
def files(tmp_path: Path, authority: Authority, clients: Authority) -> ServerFiles:
    """Return the files of a server."""
    return ServerFiles.write(tmp_path, authority.issue(), clients)


def _tls(files: ServerFiles, *, mutual: bool = False) -> TlsConfig:
    client_ca = str(files.client_ca) if mutual else ""
    return TlsConfig(certificate=str(files.certificate), private_key=str(files.private_key), client_ca=client_ca)


@contextlib.asynccontextmanager
async def _served(tls: TlsConfig) -> AsyncIterator[int]:
    """Run a server that answers with the name of its caller; return its port."""
    credentials = server_credentials(tls)
    assert credentials is not None
    identity = Identity(AuthConfig(), tls, environ={})

    async def answer(_body: bytes, context: Any) -> bytes:  # noqa: ANN401 - of gRPC
        return (await identity.identify(context, {})).encode()

    server = grpc.aio.server()
    handlers: Any = {"Am": grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Who", handlers),))
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


def _secure(port: int, credentials: grpc.ChannelCredentials) -> grpc.aio.Channel:
    return grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, [("grpc.use_local_subchannel_pool", 1)])


async def _ask(channel: grpc.aio.Channel) -> str:
    multi: Any = channel.unary_unary(PATH)
    return str((await multi(b"", timeout=10)).decode())


async def _who(port: int, credentials: grpc.ChannelCredentials) -> str:
    """Return what the server calls us, on a new connection."""
    async with _secure(port, credentials) as channel:
        return await _ask(channel)


async def _serial(port: int) -> int:
    """Return the serial number of the certificate that a new connection sees."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    raw = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()
    return x509.load_der_x509_certificate(raw).serial_number


async def test_a_client_that_trusts_the_authority_is_served(files: ServerFiles, authority: Authority) -> None:
    """TLS alone asks nobody for a name."""
    async with _served(_tls(files)) as port:
        assert await _who(port, authority.trust()) == "127.0.0.1"


async def test_a_client_that_trusts_somebody_else_is_not(files: ServerFiles) -> None:
    """A certificate of another authority is refused by the client."""
    async with _served(_tls(files)) as port:
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            await _who(port, Authority().trust())


async def test_plaintext_at_a_tls_port_gets_nothing(files: ServerFiles) -> None:
    """Without TLS there is no answer."""
    async with _served(_tls(files)) as port, wire(port) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            await _ask(channel)


async def test_a_client_is_known_by_its_certificate(
    files: ServerFiles, authority: Authority, clients: Authority
) -> None:
    """With an authority for clients, the certificate's common name is the client."""
    async with _served(_tls(files, mutual=True)) as port:
        assert await _who(port, authority.trust(clients.issue("alice"))) == "cert:alice"


@pytest.mark.parametrize("kind", ["none", "other authority", "expired"])
async def test_a_client_without_a_good_certificate_is_not_served(
    files: ServerFiles, authority: Authority, clients: Authority, kind: str
) -> None:
    """None, one of another authority, or an expired one: the handshake fails, and a canary is served beside."""
    own = {"other authority": Authority("clients").issue("alice"), "expired": clients.issue("alice", days=-1)}
    async with _served(_tls(files, mutual=True)) as port:
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            await _who(port, authority.trust(own.get(kind)))
        assert await _who(port, authority.trust(clients.issue("bob"))) == "cert:bob"


async def test_a_new_certificate_is_taken_in(files: ServerFiles, tmp_path: Path, authority: Authority) -> None:
    """A new connection sees the new certificate; one that stands goes on; nobody restarts anything."""
    async with _served(_tls(files)) as port, _secure(port, authority.trust()) as old:
        assert await _ask(old)
        other = Authority()
        pair = other.issue()
        pair.write(tmp_path, "server")
        assert await _serial(port) == pair.serial
        assert await _who(port, other.trust())
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            await _who(port, authority.trust())
        assert await _ask(old)


async def test_a_new_authority_of_clients_is_taken_in(
    files: ServerFiles, authority: Authority, clients: Authority
) -> None:
    """Clients of the new authority are let in, and those of the old one no longer."""
    async with _served(_tls(files, mutual=True)) as port:
        assert await _who(port, authority.trust(clients.issue("alice"))) == "cert:alice"
        newcomers = Authority("newcomers")
        files.client_ca.write_bytes(newcomers.certificate)
        assert await _who(port, authority.trust(newcomers.issue("bob"))) == "cert:bob"
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            await _who(port, authority.trust(clients.issue("alice")))


def _write_half(files: ServerFiles, authority: Authority) -> None:
    files.certificate.write_bytes(authority.issue().certificate)


def _write_garbage(files: ServerFiles, _authority: Authority) -> None:
    files.certificate.write_bytes(b"garbage")


def _write_expired(files: ServerFiles, authority: Authority) -> None:
    authority.issue(days=-1).write(files.certificate.parent, "server")


def _remove(files: ServerFiles, _authority: Authority) -> None:
    files.private_key.unlink()


@pytest.mark.parametrize("spoil", [_write_half, _write_garbage, _write_expired, _remove])
async def test_a_bad_new_pair_is_ignored(
    files: ServerFiles,
    authority: Authority,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[ServerFiles, Authority], None],
) -> None:
    """The old pair stays in use, with one warning; when the pair is whole again it is taken in."""
    before = x509.load_pem_x509_certificate(files.certificate.read_bytes()).serial_number
    async with _served(_tls(files)) as port:
        spoil(files, authority)
        for _ in range(3):
            assert await _serial(port) == before
        assert await _who(port, authority.trust())
        ignored = [record for record in caplog.records if "ignored" in record.message]
        assert [record.levelno for record in ignored] == [logging.WARNING]
        pair = authority.issue()
        pair.write(files.certificate.parent, "server")
        assert await _serial(port) == pair.serial


def _of_key(pair: Certificate, key: Any, encryption: Any = None) -> Certificate:  # noqa: ANN401 - of any kind
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())
    return pair._replace(private_key=pem)


_PAIR = Authority().issue()
BAD: dict[str, tuple[Certificate, str]] = {
    "certificate is not PEM": (_PAIR._replace(certificate=b"x"), "certificate: is not a certificate"),
    "key is not PEM": (_PAIR._replace(private_key=b"secret"), "private_key: is not a private key"),
    "files swapped": (Certificate(_PAIR.private_key, _PAIR.certificate), "certificate: is not a certificate"),
    "key of another": (_PAIR._replace(private_key=Authority().issue().private_key), "another certificate"),
    "encrypted": (
        _of_key(_PAIR, load_pem_private_key(_PAIR.private_key, None), BestAvailableEncryption(b"x")),
        "without a passphrase",
    ),
    "weak": (_of_key(_PAIR, rsa.generate_private_key(65537, 1024)), "2048 bits"),  # noqa: S505 - it is refused
    "unusual": (_of_key(_PAIR, ed25519.Ed25519PrivateKey.generate()), "RSA or an elliptic curve"),
    "expired": (Authority().issue(days=-2), "ended on .* renew it"),
    "of tomorrow": (Authority().issue(begins_in_days=1), "begins on"),
}


@pytest.mark.parametrize(("pair", "expected"), BAD.values(), ids=BAD)
def test_a_start_needs_a_good_pair(files: ServerFiles, pair: Certificate, expected: str) -> None:
    """What is wrong is said with the files' names, and nothing of the key."""
    pair.write(files.certificate.parent, "server")
    with pytest.raises(CredentialsError, match=expected) as caught:
        server_credentials(_tls(files))
    assert str(files.certificate) in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_start_needs_all_files(files: ServerFiles) -> None:
    """A missing key and a bad authority of clients are said."""
    files.client_ca.write_bytes(b"x")
    with pytest.raises(CredentialsError, match="client_ca: is not a certificate"):
        server_credentials(_tls(files, mutual=True))
    files.private_key.unlink()
    with pytest.raises(CredentialsError, match=r"server.key: cannot be read \(no such file"):
        server_credentials(_tls(files))


def test_no_certificate_means_plaintext() -> None:
    """Without files there are no credentials."""
    assert server_credentials(TlsConfig()) is None


@pytest.mark.parametrize(("days", "level"), [(30.5, logging.INFO), (13.5, logging.WARNING)])
def test_the_days_left_are_logged(
    files: ServerFiles, authority: Authority, caplog: pytest.LogCaptureFixture, days: float, level: int
) -> None:
    """An operator reads how long the certificate lasts, and is warned two weeks ahead."""
    caplog.set_level(logging.INFO, "serving")
    authority.issue(days=days).write(files.certificate.parent, "server")
    server_credentials(_tls(files))
    record: Any = caplog.records[-1]
    assert (record.levelno, record.days_left) == (level, int(days))


HERE = ("127.0.0.1", "127.3.2.1", "localhost", "::1", "[::1]", "::ffff:127.0.0.1", "unix:/run/vae")
ELSEWHERE = ("0.0.0.0", "::", "[::]", "", "10.0.0.1", "vae.example", "localhost.example", "127.1")  # noqa: S104 - refused


@pytest.mark.parametrize("host", HERE)
def test_plaintext_may_stay_on_this_machine(host: str) -> None:
    """On loopback nobody listens in."""
    check_plaintext(host, GatewayConfig())


@pytest.mark.parametrize("host", ELSEWHERE)
def test_plaintext_may_not_leave_this_machine(host: str, files: ServerFiles) -> None:
    """Elsewhere TLS is needed or somebody who says that something else secures the transport."""
    with pytest.raises(CredentialsError, match=r"gateway.tls.certificate.*allow_plaintext=true"):
        check_plaintext(host, GatewayConfig())
    check_plaintext(host, GatewayConfig(allow_plaintext=True))
    check_plaintext(host, GatewayConfig(tls=_tls(files)))


async def test_the_service_speaks_mutual_tls(
    bundle_dir: Path, small: Bundle, files: ServerFiles, authority: Authority, clients: Authority
) -> None:
    """The whole gateway, behind TLS, knows a client by its certificate and grants it what it may."""
    grants = [{"clients": ["cert:alice"], "methods": ["*/GetModel"]}]
    tls = _tls(files, mutual=True).model_dump()
    config = settings(bundle_dir).merge({"gateway": {"tls": tls, "auth": {"grants": grants}}})
    async with serving_with(PuppetEngine(small.manifest), small.manifest, config) as server:
        async with _secure(server.port, authority.trust(clients.issue("alice"))) as channel:
            assert (await call(channel, "GetModel", pb.GetModelRequest())).name
        async with _secure(server.port, authority.trust(clients.issue("bob"))) as channel:
            with pytest.raises(grpc.aio.AioRpcError, match="cert:bob may not call"):
                await call(channel, "GetModel", pb.GetModelRequest())
