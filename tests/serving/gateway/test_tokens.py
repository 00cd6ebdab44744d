"""Which tokens are accepted, and how the issuer's keys are kept fresh."""

import asyncio
import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jwt.algorithms import ECAlgorithm

from serving.config import JwtConfig
from serving.errors import CredentialsError
from serving.gateway.tokens import MAX_TOKEN_BYTES, Refused, Tokens, parse_key_set
from tests.tokens import (
    AUDIENCE,
    ISSUER,
    KeyServer,
    Signer,
    claims_for,
    forge,
    key_set,
    serving_keys,
    tamper,
)

SIGNERS = {name: Signer.make(name, name) for name in ("RS256", "ES256", "EdDSA")}
STRANGER = Signer.make("ES256")
NOW = int(time.time())
ALL = ("RS256", "ES256", "EdDSA")


def _config(jwks: str, **values: Any) -> JwtConfig:  # noqa: ANN401 - of any field
    return JwtConfig(issuer=ISSUER, audience=AUDIENCE, jwks=jwks, algorithms=ALL, **values)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a file with the keys of all signers."""
    path = tmp_path / "keys.json"
    path.write_bytes(key_set(*SIGNERS.values()))
    return path


@pytest.fixture
def tokens(file: Path) -> Tokens:
    """Return what verifies tokens of all signers."""
    return Tokens(_config(str(file)))


@pytest.fixture
def server() -> Iterator[KeyServer]:
    """Run a server of the key of one signer."""
    with serving_keys(key_set(SIGNERS["ES256"])) as running:
        yield running


def replace(file: Path, content: bytes) -> None:
    """Write a file anew."""
    file.write_bytes(content)


class Clock:
    """A clock that is put forward by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


@pytest.mark.parametrize("name", ALL)
async def test_a_valid_token_has_its_subject(tokens: Tokens, name: str) -> None:
    """Each algorithm that is accepted works, the second time from memory."""
    token = SIGNERS[name].token()
    assert await tokens.verify(token) == "alice"
    assert await tokens.verify(token) == "alice"


@pytest.mark.parametrize(
    "claims",
    [
        {"aud": ["other", AUDIENCE]},
        {"exp": -30},
        {"nbf": 30},
        {"sub": "a" * 128},
        {"sub": "auth0|Zoë"},
        {"iat": 0},
    ],
    ids=str,
)
async def test_what_is_still_valid(tokens: Tokens, claims: dict[str, Any]) -> None:
    """Several audiences, clocks that differ by less than the leeway, any printable subject."""
    now = time.time()  # times are given in seconds from now
    claims = {name: int(now + value) if isinstance(value, int) else value for name, value in claims.items()}
    assert await tokens.verify(SIGNERS["ES256"].token(**claims)) == claims.get("sub", "alice")


_ES, _RS = SIGNERS["ES256"], SIGNERS["RS256"]
BAD: dict[str, tuple[str, str]] = {
    "expired": (_ES.token(exp=NOW - 3600), "ExpiredSignature"),
    "not yet valid": (_ES.token(nbf=NOW + 3600), "ImmatureSignature"),
    "wrong audience": (_ES.token(aud="other"), "InvalidAudience"),
    "wrong issuer": (_ES.token(iss="https://other.test"), "InvalidIssuer"),
    "no end": (_ES.token(exp=None), "MissingRequiredClaim"),
    "no subject": (_ES.token(sub=None), "MissingRequiredClaim"),
    "no audience": (_ES.token(aud=None), "MissingRequiredClaim"),
    "no issuer": (_ES.token(iss=None), "MissingRequiredClaim"),
    "empty subject": (_ES.token(sub=""), "has a subject"),
    "long subject": (_ES.token(sub="a" * 129), "has a subject"),
    "subject with a control character": (_ES.token(sub="a\nb"), "has a subject"),
    "endless": (_ES.token(exp=float("inf")), "DecodeError"),
    "end is text": (_ES.token(exp="never"), "DecodeError"),
    "algorithm none": (forge({"alg": "none", "kid": "ES256"}, claims_for()), "algorithm"),
    "algorithm None": (forge({"alg": "None", "kid": "ES256"}, claims_for()), "algorithm"),
    "no algorithm": (forge({"kid": "ES256"}, claims_for()), "algorithm"),
    "HS256 with the public key": (
        forge({"alg": "HS256", "kid": "RS256"}, claims_for(), secret=_RS.pem()),
        "algorithm",
    ),
    "no signature": (forge({"alg": "ES256", "kid": "ES256"}, claims_for()), "InvalidSignature"),
    "signed by a stranger": (STRANGER.token(), "InvalidSignature"),
    "unknown key": (Signer.make("new").token(), "unknown key"),
    "key of another": (_ES.token(headers={"kid": "RS256"}), "another algorithm"),
    "no key named": (_ES.token(headers={"kid": None}), "no key"),
    "a key id that is a number": (forge({"alg": "ES256", "kid": 3}, claims_for()), "InvalidToken"),
    "tampered": (tamper(_ES.token(), sub="mallory"), "InvalidSignature"),
    "extensions": (_ES.token(headers={"crit": ["x"], "x": 1}), "InvalidToken"),
    "an extension that the library knows": (
        forge({"alg": "ES256", "kid": "ES256", "crit": ["b64"], "b64": True}, {}),
        "has extensions",
    ),
    "10 KB": (_ES.token(note="a" * 7500), "longer than 8 KB"),
    "deep header": (forge(json.loads("[" * 900 + "]" * 900), {}), "DecodeError"),
    "not base64": ("a.b.c", "DecodeError"),
    "empty": ("", "DecodeError"),
    "dots": ("..", "DecodeError"),
}


@pytest.mark.parametrize(("token", "reason"), BAD.values(), ids=BAD)
async def test_a_bad_token_is_refused(tokens: Tokens, token: str, reason: str) -> None:
    """Whatever is wrong, the token is refused for it, each time, and not a word of it is repeated."""
    for _ in range(2):
        with pytest.raises(Refused, match=reason) as caught:
            await tokens.verify(token)
        assert len(str(caught.value)) < 80


async def test_a_header_nested_too_deep_is_refused(tokens: Tokens) -> None:
    """Brackets that exhaust the parser's stack end as a refusal."""
    deep = base64.urlsafe_b64encode(b"[" * 5000).decode().rstrip("=")
    token = f"{deep}.e30.e30"
    assert len(token) < MAX_TOKEN_BYTES
    with pytest.raises(Refused, match=r"RecursionError|DecodeError"):
        await tokens.verify(token)


async def test_a_token_is_not_remembered_beyond_its_end(file: Path) -> None:
    """What was verified once is refused when it has expired."""
    tokens = Tokens(_config(str(file), leeway_s=0))
    token = SIGNERS["ES256"].token(exp=int(time.time()) + 2)
    assert await tokens.verify(token) == "alice"

    async def refusal() -> str:
        while True:
            try:
                await tokens.verify(token)
            except Refused as refused:
                return str(refused)
            await asyncio.sleep(0.01)

    assert "ExpiredSignature" in await asyncio.wait_for(refusal(), 5)


async def test_few_tokens_are_remembered(tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of tokens does not grow with their number; those that were forgotten are verified again."""
    monkeypatch.setattr("serving.gateway.tokens._MAX_CACHED", 2)
    many = [SIGNERS["ES256"].token(n=n) for n in range(5)]
    for token in (*many, *many):
        assert await tokens.verify(token) == "alice"
    memory: Any = tokens
    assert len(memory._cache) == 2  # noqa: SLF001 - memory has no other outside


async def test_a_set_of_one_key_needs_no_key_id(tmp_path: Path) -> None:
    """Where no doubt is possible a token need not name its key."""
    file = tmp_path / "keys.json"
    file.write_bytes(key_set(SIGNERS["ES256"]))
    assert await Tokens(_config(str(file))).verify(SIGNERS["ES256"].token(headers={"kid": None})) == "alice"


async def test_an_algorithm_that_is_not_listed_is_refused(file: Path) -> None:
    """A good key and signature do not help if the algorithm is not accepted."""
    config = JwtConfig(issuer=ISSUER, audience=AUDIENCE, jwks=str(file), algorithms=("RS256",))
    with pytest.raises(Refused, match="algorithm"):
        await Tokens(config).verify(SIGNERS["ES256"].token())


async def test_a_new_file_of_keys_is_taken_in(file: Path, tokens: Tokens) -> None:
    """A new key is known and a withdrawn one forgotten, even for tokens that were verified before."""
    old, new = SIGNERS["ES256"], Signer.make("new")
    token = old.token()
    assert await tokens.verify(token) == "alice"
    replace(file, key_set(new))
    await tokens.refresh()
    assert await tokens.verify(new.token()) == "alice"
    with pytest.raises(Refused, match="unknown key"):
        await tokens.verify(token)


async def test_a_bad_file_of_keys_is_not_taken_in(file: Path, tokens: Tokens) -> None:
    """The old keys stay while the new file is not fit."""
    replace(file, b"{}")
    await tokens.refresh()
    assert await tokens.verify(SIGNERS["ES256"].token()) == "alice"


def test_keys_that_are_not_fit_are_left_out() -> None:
    """Weak, secret, private and foreign keys verify nothing; the others do."""
    good = SIGNERS["ES256"]
    weak = Signer.make("weak", "RS256", bits=1024)
    entries = [
        weak.jwk(),
        {"kty": "oct", "k": "c2VjcmV0", "kid": "symmetric"},
        {**json.loads(ECAlgorithm.to_jwk(good.key)), "kid": "private"},  # type: ignore[arg-type]  # an EC key
        good.jwk(kid="other algorithm", alg="RS256"),
        good.jwk(kid="encryption", use="enc"),
        good.jwk(kid="other use", key_ops=["encrypt"]),
        {"kty": "EC", "kid": "malformed"},
        {"kid": "nothing"},
        good.jwk(kid=3),
        good.jwk(),
    ]
    keys = parse_key_set(json.dumps({"keys": entries}).encode())
    assert [key.kid for key in keys.keys] == [good.kid]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not a JSON Web Key Set"),
        (b"[]", "not a JSON Web Key Set"),
        (b'{"keys": 3}', "not a JSON Web Key Set"),
        (b'{"keys": ["x"]}', "not a JSON Web Key Set"),
        (b"[" * 100_000, "not a JSON Web Key Set"),
        (b'{"keys": []}', "no usable key"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_key_set_is_refused(content: bytes, expected: str) -> None:
    """A set without a usable key is as bad as none."""
    with pytest.raises(ValueError, match=expected):
        parse_key_set(content)


@pytest.mark.parametrize(
    "jwks", ["http://issuer.test/keys", "ftp://127.0.0.1/keys", "https://", "/none/keys.json"]
)
def test_where_keys_cannot_come_from(jwks: str) -> None:
    """Keys in plaintext from elsewhere, other schemes and missing files are errors at the start."""
    with pytest.raises(CredentialsError, match=r"https URL or a file|cannot be read"):
        Tokens(_config(jwks))


async def test_keys_come_from_a_server(server: KeyServer) -> None:
    """The set is fetched once at the start, and not for each token."""
    tokens = Tokens(_config(server.url))
    await tokens.start()
    for _ in range(3):
        assert await tokens.verify(SIGNERS["ES256"].token()) == "alice"
    assert server.num_requests == 1


async def test_a_new_key_of_the_server_is_fetched_when_it_is_named(server: KeyServer) -> None:
    """Many callers with a new key share one fetch; strangers with invented ids cause one each ten seconds."""
    clock, new = Clock(), Signer.make("new")
    tokens = Tokens(_config(server.url), monotonic=clock)
    await tokens.start()
    server.body = key_set(SIGNERS["ES256"], new)
    with pytest.raises(Refused, match="unknown key"):  # too early after the start
        await tokens.verify(new.token())
    assert server.num_requests == 1
    clock.now += 10
    assert await asyncio.gather(*(tokens.verify(new.token(n=n)) for n in range(20))) == ["alice"] * 20
    assert server.num_requests == 2
    for _ in range(5):
        with pytest.raises(Refused, match="unknown key"):
            await tokens.verify(Signer.make("invented").token())
    assert server.num_requests == 2


async def test_a_fetch_holds_few_strangers(server: KeyServer) -> None:
    """While the server of the keys is slow, calls with invented ids do not pile up, and known keys work."""
    clock = Clock()
    tokens = Tokens(_config(server.url), monotonic=clock)
    await tokens.start()
    clock.now += 10
    server.answers.clear()
    token = STRANGER.token(headers={"kid": "invented"})
    calls = [asyncio.create_task(tokens.verify(token)) for _ in range(300)]
    await asyncio.sleep(0)
    assert sum(call.done() for call in calls) == 200
    assert await tokens.verify(SIGNERS["ES256"].token()) == "alice"
    server.answers.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, Refused) for result in results)
    assert server.num_requests == 2


async def test_old_keys_stay_while_the_server_is_down(server: KeyServer) -> None:
    """A set that cannot be fetched again is used on, and fetched when the server is back."""
    clock = Clock()
    tokens = Tokens(_config(server.url, refresh_s=100), monotonic=clock)
    await tokens.start()
    await tokens.refresh()
    assert server.num_requests == 1
    server.status = 503
    for _ in range(3):
        clock.now += 100
        await tokens.refresh()
        assert await tokens.verify(SIGNERS["ES256"].token()) == "alice"
    assert server.num_requests == 4
    server.status, server.body = 200, key_set(SIGNERS["RS256"])
    clock.now += 10
    await tokens.refresh()
    assert await tokens.verify(SIGNERS["RS256"].token()) == "alice"
    with pytest.raises(Refused, match="unknown key"):
        await tokens.verify(SIGNERS["ES256"].token())
    await tokens.close()


@pytest.mark.parametrize(
    ("status", "headers", "body", "expected"),
    [
        (404, {}, b"", "cannot be fetched"),
        (302, {"Location": "http://127.0.0.1:9/"}, b"", "redirect"),
        (200, {}, b"not JSON", "not a JSON Web Key Set"),
        (200, {}, b" " * (2**20 + 1), "larger than"),
        (200, {"Content-Length": "5000"}, b"{}", "not a JSON Web Key Set|cannot be fetched"),
    ],
)
async def test_a_start_needs_the_keys(
    server: KeyServer, status: int, headers: dict[str, str], body: bytes, expected: str
) -> None:
    """Without the key set nobody could call, so the service does not start."""
    server.status, server.headers, server.body = status, headers, body
    with pytest.raises(CredentialsError, match=expected):
        await Tokens(_config(server.url)).start()


async def test_a_server_that_is_not_there_is_said(server: KeyServer) -> None:
    """Nobody listens: the error names the address."""
    with pytest.raises(CredentialsError, match="cannot be fetched") as caught:
        await Tokens(_config("http://127.0.0.1:1/keys")).start()
    assert "http://127.0.0.1:1/keys" in str(caught.value)
    assert server.num_requests == 0
