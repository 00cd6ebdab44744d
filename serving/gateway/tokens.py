"""JSON Web Tokens (RFC 7519): which are accepted, and the keys of their issuer (RFC 7517), kept fresh."""

import asyncio
import hashlib
import http.client
import json
import logging
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, NamedTuple, NoReturn
from urllib.parse import urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from serving.config import JwtConfig
from serving.errors import CredentialsError
from serving.gateway.credentials import MIN_RSA_BITS, is_loopback
from serving.watched import MAX_BYTES, Watched

logger = logging.getLogger(__name__)

MAX_TOKEN_BYTES: Final = 8192
"""Longest token that is looked at, bytes."""

_MAX_SUBJECT: Final = 128
_MAX_CACHED: Final = 4096
_MAX_WAITING: Final = 100
"""Calls that may wait for a fetch of the key set. Without a bound strangers pile them up by inventing ids."""

_FETCH_TIMEOUT_S: Final = 5.0
_MIN_FETCH_INTERVAL_S: Final = 10.0
_RSA: Final = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
_CURVES: Final = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}

PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | ed448.Ed448PublicKey


class Refused(Exception):
    """A token is not accepted. The text is for the log, and holds nothing of the token."""


class Key(NamedTuple):
    """One public key of the issuer."""

    kid: str | None
    """Its id in the set."""

    algorithms: frozenset[str]
    """Those it may verify."""

    public_key: PublicKey
    """Of the `cryptography` package."""


class KeySet(NamedTuple):
    """The public keys of the issuer."""

    keys: tuple[Key, ...]
    """Those that are fit to verify tokens."""

    source: str
    """The set as canonical JSON, to tell whether another is the same."""

    def knows(self, kid: str | None) -> bool:
        """Return whether a key has this id; without an id, whether there is no doubt which key is meant."""
        return len(self.keys) == 1 if kid is None else any(key.kid == kid for key in self.keys)

    def pick(self, kid: str | None, algorithm: str) -> PublicKey:
        """Return the key that a token names.

        Raises:
            Refused: If there is none, or it is not one of the algorithm.
        """
        if not self.knows(kid):
            raise Refused("names no key" if kid is None else "names an unknown key")
        for key in self.keys:
            if kid in {None, key.kid} and algorithm in key.algorithms:
                return key.public_key
        raise Refused("names a key of another algorithm")


class Tokens:
    """Verifies tokens of one issuer. Must be used on one event loop.

    Args:
        config: What is accepted.
        monotonic: Clock of the fetches, seconds.

    Raises:
        CredentialsError: If the file of the key set is not fit, or the URL is not https.
    """

    def __init__(self, config: JwtConfig, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._config, self._monotonic = config, monotonic
        self._cache: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        self._file: Watched[KeySet] | None = None
        self._fetching: asyncio.Task[None] | None = None
        self._num_waiting = 0
        self._fetched_at = self._tried_at = -float("inf")
        self._keys = KeySet((), "")
        if "://" in config.jwks:
            _check_url(config.jwks)
        else:
            self._file = Watched([config.jwks], parse_key_set)
            self._keys = self._file.value

    async def start(self) -> None:
        """Fetch the key set, if it is not a file.

        Raises:
            CredentialsError: If it cannot be had.
        """
        if self._file is None:
            self._tried_at = self._monotonic()
            try:
                self._use(await asyncio.to_thread(_fetch, self._config.jwks))
            except ValueError as error:
                raise CredentialsError(source=self._config.jwks, problem=str(error)) from None
            self._fetched_at = self._monotonic()

    async def refresh(self) -> None:
        """Take in a new key set, if the file changed or the set is old. To be called every second or so."""
        if self._file is not None:
            if self._file.is_stale() and await asyncio.to_thread(self._file.refresh):
                self._use(self._file.value)
            return
        now, pause_s = self._monotonic(), min(self._config.refresh_s, _MIN_FETCH_INTERVAL_S)
        if now - self._fetched_at >= self._config.refresh_s and now - self._tried_at >= pause_s:
            await self._shared_fetch()

    async def close(self) -> None:
        """Wait no longer for a fetch."""
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.gather(self._fetching, return_exceptions=True)

    async def verify(self, token: str) -> str:
        """Return the subject of a token.

        Raises:
            Refused: If the token is not accepted.
        """
        if len(token) > MAX_TOKEN_BYTES:
            raise Refused("is longer than 8 KB")
        digest = hashlib.sha256(token.encode(errors="replace")).digest()
        if (known := self._cache.get(digest)) is not None:
            subject, valid_until = known
            if time.time() < valid_until:
                self._cache.move_to_end(digest)
                return subject
            del self._cache[digest]
        kid, algorithm = self._read_header(token)
        if not self._keys.knows(kid) and kid is not None:
            await self._fetch_early()
        subject, expires = self._decode(token, self._keys.pick(kid, algorithm), algorithm)
        self._cache[digest] = subject, expires + self._config.leeway_s
        if len(self._cache) > _MAX_CACHED:
            self._cache.popitem(last=False)
        return subject

    def _read_header(self, token: str) -> tuple[str | None, str]:
        """Return key id and algorithm. Nothing of it is trusted: both only choose among what we hold."""
        header = _guarded(jwt.get_unverified_header, token)
        algorithm = header.get("alg")
        if algorithm not in self._config.algorithms:
            raise Refused("has an algorithm that is not accepted")
        if "crit" in header:
            raise Refused("has extensions that must be understood")  # RFC 7515, 4.1.11
        return header.get("kid"), str(algorithm)

    def _decode(self, token: str, key: PublicKey, algorithm: str) -> tuple[str, int]:
        """Return subject and end of a token whose signature and claims hold."""
        config = self._config
        claims = _guarded(
            jwt.decode,
            token,
            key=key,
            algorithms=[algorithm],
            audience=config.audience,
            issuer=config.issuer,
            leeway=config.leeway_s,
            options={"require": ["exp", "iss", "aud", "sub"]},
        )
        subject = claims["sub"]
        if not 1 <= len(subject) <= _MAX_SUBJECT or not subject.isprintable():
            raise Refused("has a subject that is empty, too long or not printable")
        return subject, int(claims["exp"])

    def _use(self, keys: KeySet) -> None:
        if keys.source != self._keys.source:
            self._keys = keys
            self._cache.clear()  # a key may have been withdrawn
            logger.info("key set loaded", extra={"num_keys": len(keys.keys)})

    async def _fetch_early(self) -> None:
        """Fetch because a key is unknown; who comes meanwhile waits for the same fetch."""
        is_running = self._fetching is not None
        is_due = self._file is None and self._monotonic() - self._tried_at >= _MIN_FETCH_INTERVAL_S
        if (is_running or is_due) and self._num_waiting < _MAX_WAITING:
            self._num_waiting += 1
            try:
                await self._shared_fetch()
            finally:
                self._num_waiting -= 1

    async def _shared_fetch(self) -> None:
        if self._fetching is None:
            self._tried_at = self._monotonic()
            self._fetching = asyncio.get_running_loop().create_task(self._fetch())
        await asyncio.shield(self._fetching)

    async def _fetch(self) -> None:
        try:
            self._use(await asyncio.to_thread(_fetch, self._config.jwks))
            self._fetched_at = self._monotonic()
        except ValueError as error:
            logger.warning("key set not fetched, the old one stays in use", extra={"reason": str(error)})
        finally:
            self._fetching = None


def parse_key_set(content: bytes) -> KeySet:
    """Return the usable keys of a JSON Web Key Set; what is not usable is logged and left out.

    Raises:
        ValueError: If it is not a key set, or has no usable key.
    """
    try:
        tree = json.loads(content)
        entries = [dict(entry) for entry in tree["keys"]]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError("is not a JSON Web Key Set; expected an object with `keys`") from None
    keys = []
    for entry in entries:
        try:
            keys.append(_key(entry))
        except (ValueError, TypeError, KeyError, jwt.PyJWTError) as error:
            reason = str(error) if isinstance(error, _Unusable) else "malformed"
            logger.warning("key of the key set left out", extra={"kid": str(entry.get("kid")), "reason": reason})
    if not keys:
        raise ValueError("has no usable key; expected public RSA keys of 2048 bits or more, or EC or OKP keys")
    return KeySet(tuple(keys), json.dumps(tree, sort_keys=True))


class _Unusable(ValueError):
    """A key is well formed and not for us."""


def _key(entry: dict[str, Any]) -> Key:
    if "d" in entry:
        raise _Unusable("it is private; publish the public part alone")
    if entry.get("use", "sig") != "sig" or "verify" not in entry.get("key_ops", ["verify"]):
        raise _Unusable("it is not for signatures")
    kinds: dict[str, Any] = {"RSA": RSAAlgorithm, "EC": ECAlgorithm, "OKP": OKPAlgorithm}
    if entry["kty"] not in kinds:
        raise _Unusable("it is of another kind")
    public_key: Any = kinds[entry["kty"]].from_jwk(entry)
    algorithms = _algorithms(public_key) & {entry["alg"]} if "alg" in entry else _algorithms(public_key)
    if not algorithms:
        raise _Unusable("its algorithm is of another kind")
    kid = entry.get("kid")
    if kid is not None and not isinstance(kid, str):
        raise _Unusable("its id is not text")
    return Key(kid, algorithms, public_key)


def _algorithms(public_key: object) -> frozenset[str]:
    """Return what a key may verify: a key of one kind never serves an algorithm of another."""
    if isinstance(public_key, rsa.RSAPublicKey):
        if public_key.key_size < MIN_RSA_BITS:
            raise _Unusable(f"it has fewer than {MIN_RSA_BITS} bits")
        return _RSA
    if isinstance(public_key, ec.EllipticCurvePublicKey):
        return frozenset({_CURVES[public_key.curve.name]})
    if isinstance(public_key, ed25519.Ed25519PublicKey | ed448.Ed448PublicKey):
        return frozenset({"EdDSA"})
    raise _Unusable("it cannot verify signatures")


def _guarded(function: Callable[..., dict[str, Any]], *arguments: object, **named: object) -> dict[str, Any]:
    """Call into PyJWT with what a stranger sent.

    Raises:
        Refused: Whatever it raises; its text may repeat what was sent, so only the class is told.
    """
    try:
        return function(*arguments, **named)
    except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
        # The last four: numbers and nesting that its parsers do not expect.
        raise Refused(type(error).__name__) from None


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.hostname and (parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname))):
        return
    raise CredentialsError(
        source=f"gateway.auth.jwt.jwks {url!r}",
        problem="keys fetched in plaintext could be anybody's; use an https URL or a file",
    )


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows nothing: a redirect could lead to plaintext, or to a service inside the network."""

    def redirect_request(self, *_: object) -> NoReturn:
        """Refuse."""
        raise ValueError("answers with a redirect; name the address that it leads to")


def _fetch(url: str) -> KeySet:
    """Return the key set at a URL. Blocks.

    Raises:
        ValueError: If it cannot be had in time, is too large or not a key set.
    """
    give_up_at = time.monotonic() + _FETCH_TIMEOUT_S
    handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
    if is_loopback(urlsplit(url).hostname or ""):
        handlers.append(urllib.request.ProxyHandler({}))  # a proxy's loopback is another machine's
    content = b""
    try:
        with urllib.request.build_opener(*handlers).open(url, timeout=_FETCH_TIMEOUT_S) as response:
            # The timeout above is one of silence; whoever sends a byte at a time is given up here.
            while len(content) <= MAX_BYTES and time.monotonic() < give_up_at:
                part = response.read1(MAX_BYTES)
                if not part:
                    return parse_key_set(content)
                content += part
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise ValueError(f"cannot be fetched ({reason}); check the address") from None
    raise ValueError(f"is larger than {MAX_BYTES} bytes, or took longer than {_FETCH_TIMEOUT_S:g} s")
