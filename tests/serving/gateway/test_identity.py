"""Who calls is known before the body is read; bad credentials are refused alike; good ones go on beside them."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from protos.vae.v1 import vae_pb2 as pb
from serving import api_keys
from serving.bundle import Bundle
from serving.config import AuthConfig, Grant, JwtConfig, TlsConfig
from serving.errors import CredentialsError, PermissionDenied, Unauthenticated
from serving.gateway.identity import Identity
from serving.watched import Watched
from tests.serving.harness import (
    SERVICE,
    PuppetEngine,
    call,
    eventually,
    failure,
    serving_with,
    settings,
    trailers,
    wire,
)
from tests.tokens import AUDIENCE, ISSUER, Signer, claims_for, forge, key_set, tamper

KEY, OTHER, EXPIRED = (api_keys.new_key() for _ in range(3))
SIGNER, STRANGER = Signer.make("ours"), Signer.make("ours")
METHOD = f"{SERVICE}/Encode"
REQUEST = pb.SampleRequest(num_samples=1)


def _entry(name: str, key: str, **times: str) -> dict[str, str]:
    return {"name": name, "sha256": api_keys.digest_of(key), **times}


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    """Return a file with one good and one expired key."""
    path = tmp_path / "keys.yaml"
    entries = [_entry("team-a", KEY), _entry("team-b", EXPIRED, expires="2020-01-01T00:00:00Z")]
    path.write_text(json.dumps(entries))  # JSON is YAML
    return path


@pytest.fixture
def auth(tmp_path: Path, keys_file: Path) -> AuthConfig:
    """Return a configuration with API keys and tokens."""
    jwks = tmp_path / "jwks.json"
    jwks.write_bytes(key_set(SIGNER))
    tokens = JwtConfig(issuer=ISSUER, audience=AUDIENCE, jwks=str(jwks))
    return AuthConfig(api_keys_file=str(keys_file), jwt=tokens)


class _Context:
    """What a handler sees of a connection."""

    def __init__(self, peer: str = "ipv4:10.0.0.1:5123", names: tuple[bytes, ...] = ()) -> None:
        self._peer, self._names = peer, names

    def peer(self) -> str:
        """Return the other end."""
        return self._peer

    def auth_context(self) -> Mapping[str, tuple[bytes, ...]]:
        """Return what the handshake learned."""
        return {"x509_common_name": self._names} if self._names else {}


async def _identify(identity: Identity, context: _Context | None = None, /, **metadata: str) -> str:
    headers: dict[str, str | bytes] = {name.replace("_", "-"): value for name, value in metadata.items()}
    return await identity.identify(cast("Any", context or _Context()), headers)


def _bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        ("ipv4:127.0.0.1:5123", "127.0.0.1"),
        ("ipv6:%5B::1%5D:5123", "::1"),
        ("ipv6:[2001:db8::1]:5123", "2001:db8::1"),
        ("unix:/run/vae.sock", "unix"),
        ("unix:", "unix"),
        ("", ""),
    ],
)
async def test_a_stranger_is_an_address(peer: str, expected: str) -> None:
    """Where nobody needs credentials a client is where it calls from, whatever it sends, without the port."""
    identity = Identity(AuthConfig(), TlsConfig(), environ={})
    assert not identity.needs_credentials
    for _ in range(2):
        assert await _identify(identity, _Context(peer), authorization="Bearer x") == expected


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"x_api_key": KEY}, "key:team-a"),
        ({"authorization": f"Bearer {KEY}"}, "key:team-a"),
        ({"authorization": f"bearer  {KEY} "}, "key:team-a"),
        ({"authorization": f"Bearer {SIGNER.token(sub='bob')}"}, "jwt:bob"),
    ],
)
async def test_good_credentials_have_a_name(auth: AuthConfig, metadata: dict[str, str], expected: str) -> None:
    """Keys come in either header, tokens as bearer; the name says which."""
    identity = Identity(auth, TlsConfig(), environ={})
    assert identity.needs_credentials
    assert await _identify(identity, **metadata) == expected


async def test_keys_come_from_the_environment(keys_file: Path) -> None:
    """The variable alone does, and beside the file both count."""
    environ = {"VAE_API_KEYS": f"ops:{api_keys.digest_of(OTHER)}"}
    assert await _identify(Identity(AuthConfig(), TlsConfig(), environ=environ), x_api_key=OTHER) == "key:ops"
    both = Identity(AuthConfig(api_keys_file=str(keys_file)), TlsConfig(), environ=environ)
    assert await _identify(both, x_api_key=OTHER) == "key:ops"
    assert await _identify(both, x_api_key=KEY) == "key:team-a"


@pytest.mark.parametrize("value", ["", " ", "team-a", f"team-a:{KEY}"])
def test_a_variable_that_names_no_key_is_an_error(value: str) -> None:
    """A secret that was not delivered must not open the service to everybody, and is not repeated."""
    with pytest.raises(CredentialsError, match="VAE_API_KEYS") as caught:
        Identity(AuthConfig(), TlsConfig(), environ={"VAE_API_KEYS": value})
    assert KEY not in str(caught.value)


def test_a_key_in_file_and_variable_is_an_error(keys_file: Path) -> None:
    """The same key under two names is nobody's."""
    environ = {"VAE_API_KEYS": f"ops:{api_keys.digest_of(KEY)}"}
    with pytest.raises(CredentialsError, match="are the same key"):
        Identity(AuthConfig(api_keys_file=str(keys_file)), TlsConfig(), environ=environ)


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """A missing file is said at the start, with its name."""
    with pytest.raises(CredentialsError, match=r"none\.yaml: cannot be read"):
        Identity(AuthConfig(api_keys_file=str(tmp_path / "none.yaml")), TlsConfig(), environ={})


TLS = TlsConfig(certificate="server.crt", private_key="server.key", client_ca="clients.crt")


async def test_a_certificate_has_a_name() -> None:
    """The handshake verified it; its common name is the client."""
    identity = Identity(AuthConfig(), TLS, environ={})
    assert identity.needs_credentials
    assert await _identify(identity, _Context(names=(b"alice",))) == "cert:alice"


async def test_what_is_sent_counts_before_the_certificate(auth: AuthConfig) -> None:
    """A valid key names the client; an invalid one is refused in spite of a valid certificate."""
    identity = Identity(auth, TLS, environ={})
    context = _Context(names=(b"alice",))
    assert await _identify(identity, context) == "cert:alice"
    assert await _identify(identity, context, x_api_key=KEY) == "key:team-a"
    for metadata in ({"x_api_key": "wrong"}, {"authorization": f"Bearer {SIGNER.token(aud='other')}"}):
        with pytest.raises(Unauthenticated):
            await _identify(identity, context, **metadata)
    with pytest.raises(Unauthenticated):
        await _identify(Identity(AuthConfig(), TLS, environ={}), context, authorization="Bearer x")


@pytest.mark.parametrize("names", [(), (b"",), (b"a", b"b"), (b"\xff",), (b"a\nb",), (b"a" * 129,)])
async def test_a_certificate_without_one_good_name_is_nobody(names: tuple[bytes, ...]) -> None:
    """No name, two names, or one that is not fit for a log."""
    with pytest.raises(Unauthenticated, match="a client certificate"):
        await _identify(Identity(AuthConfig(), TLS, environ={}), _Context(names=names))


async def test_the_detail_is_for_the_log_and_holds_no_secret(auth: AuthConfig) -> None:
    """An operator reads why; the caller reads what is expected; neither reads the token."""
    identity = Identity(auth, TlsConfig(), environ={})
    token = SIGNER.token(exp=1)
    with pytest.raises(Unauthenticated) as caught:
        await _identify(identity, authorization=f"Bearer {token}")
    assert caught.value.detail == "JWT: ExpiredSignatureError"
    assert str(caught.value) == (
        "no valid credentials; this service expects an API key (x-api-key, or authorization: Bearer) "
        "or a JWT (authorization: Bearer)"
    )
    with pytest.raises(Unauthenticated) as caught:
        await _identify(identity, x_api_key=EXPIRED)
    assert caught.value.detail == "an expired API key of team-b"


async def test_keys_rotate_without_a_restart(keys_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A new key is soon accepted, a withdrawn one soon refused, and a bad or missing file changes nothing."""
    identity = Identity(AuthConfig(api_keys_file=str(keys_file)), TlsConfig(), environ={}, poll_s=0.01)
    await identity.start()

    async def accepts(key: str) -> bool:
        try:
            return bool(await _identify(identity, x_api_key=key))
        except Unauthenticated:
            return False

    async def until(key: str, *, accepted: bool) -> None:
        async with asyncio.timeout(5):
            while await accepts(key) != accepted:  # noqa: ASYNC110 - the change is not ours to signal
                await asyncio.sleep(0.005)

    write, remove = keys_file.write_text, keys_file.unlink
    write(json.dumps([_entry("team-a", KEY), _entry("team-a", OTHER)]))
    await until(OTHER, accepted=True)
    assert await accepts(KEY)
    write(json.dumps([_entry("team-a", OTHER)]))
    await until(KEY, accepted=False)
    write("not: a list")
    await eventually(lambda: len(_ignored(caplog)) == 1)
    assert await accepts(OTHER)
    remove()
    await eventually(lambda: len(_ignored(caplog)) == 2)
    assert await accepts(OTHER)
    write(json.dumps([_entry("team-a", KEY)]))
    await until(KEY, accepted=True)
    await identity.close()


async def test_a_surprise_does_not_end_the_watch(
    keys_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception that nobody expected is logged, and later changes are still taken in."""
    identity = Identity(AuthConfig(api_keys_file=str(keys_file)), TlsConfig(), environ={}, poll_s=0.01)
    with monkeypatch.context() as patched:
        patched.setattr(Watched, "is_stale", lambda _: 1 / 0)
        await identity.start()
        await eventually(lambda: "credentials not refreshed" in caplog.text)
    caplog.set_level(logging.INFO, "serving")
    write = keys_file.write_text
    write("[]")
    await eventually(lambda: "API keys loaded" in caplog.text)
    with pytest.raises(Unauthenticated):
        await _identify(identity, x_api_key=KEY)
    await identity.close()


def _ignored(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.message.startswith("files ignored")]


GRANTS = (
    Grant(clients=("key:team-*",), methods=(f"{SERVICE}/*",)),
    Grant(clients=("jwt:alice", "cert:al?ce"), methods=("*/Encode", "inference.GRPCInferenceService/Model*")),
    Grant(clients=("jwt:a[bc]",), methods=("*",)),
)


@pytest.mark.parametrize(
    ("client", "path", "is_allowed"),
    [
        ("key:team-a", f"{SERVICE}/Sample", True),
        ("key:team-a", "inference.GRPCInferenceService/ModelInfer", False),
        ("key:other", f"{SERVICE}/Sample", False),
        ("jwt:team-a", f"{SERVICE}/Sample", False),
        ("jwt:alice", f"{SERVICE}/Encode", True),
        ("jwt:alice", f"{SERVICE}/Sample", False),
        ("jwt:alice2", f"{SERVICE}/Encode", False),
        ("jwt:Alice", f"{SERVICE}/Encode", False),
        ("xjwt:alice", f"{SERVICE}/Encode", False),
        ("cert:alice", "inference.GRPCInferenceService/ModelInfer", True),
        ("jwt:a[bc]", f"{SERVICE}/Sample", True),
        ("jwt:ab", f"{SERVICE}/Sample", False),
        ("127.0.0.1", f"{SERVICE}/Sample", False),
    ],
)
def test_grants(client: str, path: str, is_allowed: bool) -> None:  # noqa: FBT001 - a column of a table
    """With grants, what none of them allows is refused; patterns know `*` and `?` and nothing else."""
    identity = Identity(AuthConfig(grants=GRANTS), TlsConfig(), environ={})
    for _ in range(2):
        with contextlib.nullcontext() if is_allowed else pytest.raises(PermissionDenied, match="may not call"):
            identity.authorize(client, path)


def test_without_grants_whoever_is_known_may_call() -> None:
    """Grants narrow; none are needed."""
    Identity(AuthConfig(), TlsConfig(), environ={}).authorize("key:a", METHOD)


# Over a real socket, as an outside client.


@pytest.fixture
async def port(bundle_dir: Path, small: Bundle, auth: AuthConfig) -> AsyncIterator[int]:
    """Run the service with keys and tokens; it lets long metadata in, so that it must refuse them itself."""
    config = settings(bundle_dir, "gateway.transport.max_metadata_bytes=65536").merge(
        {"gateway": {"auth": auth.model_dump()}}
    )
    async with serving_with(PuppetEngine(small.manifest), small.manifest, config) as server:
        yield server.port


_RS = Signer.make("ours", "RS256")
BAD: dict[str, tuple[tuple[str, str], ...]] = {
    "none": (),
    "wrong key": (("x-api-key", api_keys.new_key()),),
    "empty key": (("x-api-key", ""),),
    "expired key": (("x-api-key", EXPIRED),),
    "digest in place of the key": (("x-api-key", api_keys.digest_of(KEY)),),
    "key in other case": (("x-api-key", KEY.swapcase()),),
    "basic": (("authorization", f"Basic {KEY}"),),
    "no scheme": (("authorization", KEY),),
    "bearer of nothing": _bearer(""),
    "expired token": _bearer(SIGNER.token(exp=1)),
    "token of tomorrow": _bearer(SIGNER.token(nbf=2**33)),
    "wrong audience": _bearer(SIGNER.token(aud="other")),
    "wrong issuer": _bearer(SIGNER.token(iss="other")),
    "no end": _bearer(SIGNER.token(exp=None)),
    "no subject": _bearer(SIGNER.token(sub=None)),
    "algorithm none": _bearer(forge({"alg": "none", "kid": "ours"}, claims_for())),
    "public key as secret": _bearer(forge({"alg": "HS256", "kid": "ours"}, claims_for(), secret=SIGNER.pem())),
    "unknown key id": _bearer(SIGNER.token(headers={"kid": "other"})),
    "signed by a stranger": _bearer(STRANGER.token()),
    "key of another kind": _bearer(_RS.token()),
    "tampered": _bearer(tamper(SIGNER.token(), sub="mallory")),
    "10 KB": _bearer(SIGNER.token(note="a" * 7500)),
    "10 KB without dots": _bearer("a" * 10_000),
    "two at once": (*_bearer(SIGNER.token()), ("x-api-key", KEY)),
    "one good, one bad": (*_bearer(STRANGER.token()), ("x-api-key", KEY)),
}


async def test_bad_credentials_are_refused_alike(port: int) -> None:
    """Each is UNAUTHENTICATED with the same text, and a caller with a good key gets answers all the while."""
    is_over, num_answers = False, 0

    async def canary() -> None:
        nonlocal num_answers
        async with wire(port) as own:
            while not is_over:
                for good in ((("x-api-key", KEY),), _bearer(SIGNER.token())):
                    answer = await call(own, "Sample", REQUEST, metadata=good)
                    assert answer.model_version
                    num_answers += 1

    task = asyncio.create_task(canary())
    texts = set()
    async with wire(port) as channel:
        for name, metadata in BAD.items():
            error = await failure(channel, "Sample", REQUEST, metadata=metadata)
            assert error.code() == grpc.StatusCode.UNAUTHENTICATED, (name, error)
            assert trailers(error)["vae-error-reason"] == "UNAUTHENTICATED", name
            texts.add(error.details())
    is_over = True
    await task
    assert len(BAD) >= 15
    assert len(texts) == 1
    assert num_answers >= 2


async def test_the_refusal_does_not_wait_for_the_body(port: int) -> None:
    """A stranger that sends headers and never a body is told at once."""
    never = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        await never.wait()
        yield b""

    async with wire(port) as channel, asyncio.timeout(5):
        stream: Any = channel.stream_unary(f"/{METHOD}")
        with pytest.raises(grpc.aio.AioRpcError, match="no valid credentials"):
            await stream(body(), metadata=(("x-api-key", "wrong"),))


async def test_grants_hold_over_the_wire(bundle_dir: Path, small: Bundle, auth: AuthConfig) -> None:
    """A known client that may not call a method is told PERMISSION_DENIED, its own name and the method."""
    grants = [{"clients": ["key:team-a"], "methods": ["*/GetModel"]}]
    config = settings(bundle_dir).merge({"gateway": {"auth": {**auth.model_dump(), "grants": grants}}})
    good = (("x-api-key", KEY),)
    async with (
        serving_with(PuppetEngine(small.manifest), small.manifest, config) as server,
        wire(server.port) as channel,
    ):
        await call(channel, "GetModel", pb.GetModelRequest(), metadata=good)
        error = await failure(channel, "Sample", REQUEST, metadata=good)
        assert error.code() == grpc.StatusCode.PERMISSION_DENIED
        assert error.details() == f"key:team-a may not call {SERVICE}/Sample; ask the operator for a grant"


async def test_the_service_takes_in_new_keys(port: int, keys_file: Path) -> None:
    """A key that is added to the file of a running service is accepted within seconds."""
    keys_file.write_text(json.dumps([_entry("team-c", OTHER)]))  # noqa: ASYNC240 - a small file
    async with wire(port) as channel:
        codes: list[grpc.StatusCode] = []

        async def ask() -> None:
            while not codes or codes[-1] != grpc.StatusCode.OK:
                try:
                    await call(channel, "Sample", REQUEST, metadata=(("x-api-key", OTHER),))
                    codes.append(grpc.StatusCode.OK)
                except grpc.aio.AioRpcError as error:
                    codes.append(error.code())
                    await asyncio.sleep(0.02)

        task = asyncio.create_task(ask())
        await eventually(task.done)
        await task
        error = await failure(channel, "Sample", REQUEST, metadata=(("x-api-key", KEY),))
        assert error.code() == grpc.StatusCode.UNAUTHENTICATED
