"""Who calls, and what they may: API keys, JSON Web Tokens and client certificates.

Names of clients are `key:NAME`, `jwt:SUBJECT` and `cert:COMMON NAME`; where nobody needs credentials, a client is
the address it calls from.
"""

import asyncio
import contextlib
import fnmatch
import logging
import os
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, Literal
from urllib.parse import unquote

import grpc

from serving import api_keys
from serving.api_keys import ApiKey
from serving.config import AuthConfig, TlsConfig
from serving.errors import CredentialsError, PermissionDenied, Unauthenticated
from serving.gateway.tokens import MAX_TOKEN_BYTES, Refused, Tokens
from serving.watched import Watched

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Policy = Literal["open", "authenticated", "disabled"]

HEALTH: Final = "grpc.health.v1.Health"
REFLECTION: Final = ("grpc.reflection.v1alpha.ServerReflection", "grpc.reflection.v1.ServerReflection")
_AUTHORIZATION: Final = "authorization"
_API_KEY: Final = "x-api-key"
_JWT: Final = re.compile(r"[\w-]+\.[\w-]+\.[\w-]*", re.ASCII)
_MAX_NAME: Final = 128
_MAX_REMEMBERED: Final = 10_000
_POLL_S: Final = 1.0


class Identity:
    """Tells clients apart by what they bring, and says what they may.

    Args:
        auth: Which credentials are accepted, and who may call what.
        tls: Whether clients have certificates.
        environ: Where the variable with API keys is looked up.
        poll_s: Time between two looks at the files, seconds.

    Raises:
        CredentialsError: If a file or the variable is not fit.
    """

    def __init__(
        self,
        auth: AuthConfig,
        tls: TlsConfig,
        *,
        environ: Mapping[str, str] = os.environ,
        poll_s: float = _POLL_S,
    ) -> None:
        self._auth, self._has_certificates, self._poll_s = auth, bool(tls.client_ca), poll_s
        self._keys = _Keys(auth, environ)
        self._tokens = Tokens(auth.jwt) if auth.jwt else None
        self._needs_credentials = self._keys.are_used or self._tokens is not None or self._has_certificates
        self._expected = self._describe()
        self._grants = [(_patterns(grant.clients), _patterns(grant.methods)) for grant in auth.grants]
        self._decisions: dict[tuple[str, str], bool] = {}
        self._addresses: dict[str, str] = {}
        self._watch: asyncio.Task[None] | None = None

    @property
    def needs_credentials(self) -> bool:
        """Whether callers without credentials are refused."""
        return self._needs_credentials

    async def start(self) -> None:
        """Fetch the key set of tokens, and begin to watch what may change.

        Raises:
            CredentialsError: If the key set cannot be had.
        """
        if self._tokens is not None:
            await self._tokens.start()
        if self._keys.are_used or self._tokens is not None:
            self._watch = asyncio.get_running_loop().create_task(self._refresh_for_ever())

    async def close(self) -> None:
        """Watch no longer."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        if self._tokens is not None:
            await self._tokens.close()

    async def identify(self, context: Context, metadata: Mapping[str, str | bytes]) -> str:
        """Return the name of a caller.

        What a caller sends counts before its certificate, and is refused if it is not valid: a caller must not
        become somebody else because its token has expired.

        Args:
            context: Of gRPC.
            metadata: What came beside the body.

        Raises:
            Unauthenticated: If the caller needs credentials and brings none, or none that are valid.
        """
        if not self._needs_credentials:
            return self._address(context.peer())
        try:
            return await self._name(context, metadata.get(_AUTHORIZATION), metadata.get(_API_KEY))
        except Refused as refused:
            raise Unauthenticated(expected=self._expected, detail=str(refused)) from None

    def authorize(self, client: str, path: str) -> None:
        """Let a client call a method. Health and reflection have policies of their own instead.

        Args:
            client: Its name.
            path: Full name of the method, such as `vae.v1.VaeService/Encode`.

        Raises:
            PermissionDenied: If there are grants, and none is for this client and method.
        """
        if not self._grants:
            return
        is_allowed = self._decisions.get((client, path))
        if is_allowed is None:
            is_allowed = any(who.fullmatch(client) and what.fullmatch(path) for who, what in self._grants)
            _remember(self._decisions, (client, path), is_allowed)
        if not is_allowed:
            raise PermissionDenied(client=client, method=path)

    def policy_for(self, path: str) -> Policy:
        """Return who may call a method: anybody, whoever is known, or nobody."""
        service = path.partition("/")[0]
        if service == HEALTH:
            return self._auth.health
        return self._auth.reflection if service in REFLECTION else "authenticated"

    async def _name(self, context: Context, header: str | bytes | None, key: str | bytes | None) -> str:
        if header is not None and key is not None:
            raise Refused("two credentials at once")
        if key is not None:
            return f"key:{self._keys.name_of(key)}"
        if header is not None:
            return await self._bearer(header)
        if self._has_certificates:
            return _common_name(context)
        raise Refused("no credentials")

    async def _bearer(self, header: str | bytes) -> str:
        """Return the name of who brings an `authorization` header."""
        scheme, _, token = str(header).partition(" ")
        if scheme.lower() != "bearer":
            raise Refused("an authorization that is not Bearer")
        token = token.strip()
        if self._tokens is not None and (_JWT.fullmatch(token) or len(token) > MAX_TOKEN_BYTES):
            try:
                return f"jwt:{await self._tokens.verify(token)}"
            except Refused as refused:
                raise Refused(f"JWT: {refused}") from None
        return f"key:{self._keys.name_of(token)}"

    def _address(self, peer: str) -> str:
        """Return the address of a peer, such as `ipv6:%5B::1%5D:5123`, without its port."""
        address = self._addresses.get(peer)
        if address is None:
            kind, _, rest = peer.partition(":")
            address = unquote(rest.rpartition(":")[0]).strip("[]") if kind in {"ipv4", "ipv6"} else kind
            _remember(self._addresses, peer, address)
        return address

    def _describe(self) -> str:
        ways = []
        if self._keys.are_used:
            ways.append("an API key (x-api-key, or authorization: Bearer)")
        if self._tokens is not None:
            ways.append("a JWT (authorization: Bearer)")
        if self._has_certificates:
            ways.append("a client certificate")
        return " or ".join(ways)

    async def _refresh_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                await self._keys.refresh()
                if self._tokens is not None:
                    await self._tokens.refresh()
            except Exception:
                logger.exception("credentials not refreshed, the old ones stay in use")


class _Keys:
    """The API keys of the file and of the variable."""

    def __init__(self, auth: AuthConfig, environ: Mapping[str, str]) -> None:
        variable = auth.api_keys_variable
        text = environ.get(variable) if variable else None
        # Set and empty is a secret that was not delivered: to let everybody in would be the wrong answer.
        sources = {"gateway.auth.api_keys": auth.api_keys or None, variable: text}
        self._fixed: list[ApiKey] = []
        for source, keys in sources.items():
            try:
                self._fixed += api_keys.parse_variable(keys) if keys is not None else []
                api_keys.unique(self._fixed)
            except ValueError as error:
                raise CredentialsError(source=source, problem=str(error)) from None
        self._file = Watched([auth.api_keys_file], self._parse) if auth.api_keys_file else None
        self.are_used = bool(self._fixed) or self._file is not None
        self._by_digest = self._index()

    def name_of(self, key: str | bytes) -> str:
        """Return whose key it is.

        The lookup by digest may take as long as it likes: whoever times it learns about digests of keys that it
        chose at random, and can neither choose a digest nor go back from one to a key.

        Raises:
            Refused: If it is nobody's, or has expired.
        """
        found = self._by_digest.get(api_keys.digest_of(str(key)))
        if found is None:
            raise Refused("an unknown API key")
        if found.is_expired(datetime.now(UTC)):
            raise Refused(f"an expired API key of {found.name}")
        return found.name

    async def refresh(self) -> None:
        """Read the file again if it changed."""
        if self._file is not None and self._file.is_stale() and await asyncio.to_thread(self._file.refresh):
            self._by_digest = self._index()
            logger.info("API keys loaded", extra={"num_keys": len(self._by_digest)})

    def _parse(self, content: bytes) -> list[ApiKey]:
        return api_keys.unique([*self._fixed, *api_keys.parse_file(content)])

    def _index(self) -> dict[str, ApiKey]:
        return {key.sha256: key for key in (self._file.value if self._file else self._fixed)}


def _common_name(context: Context) -> str:
    """Return the name in the certificate that the handshake verified."""
    with contextlib.suppress(ValueError):
        (raw,) = context.auth_context().get("x509_common_name", ())
        name = raw.decode()
        if 1 <= len(name) <= _MAX_NAME and name.isprintable():
            return f"cert:{name}"
    raise Refused("no certificate with one printable common name")


def _patterns(patterns: Iterable[str]) -> re.Pattern[str]:
    """Return one expression for patterns that know `*` and `?`; brackets mean themselves."""
    return re.compile("|".join(fnmatch.translate(pattern.replace("[", "[[]")) for pattern in patterns))


def _remember(memory: dict[Any, Any], key: object, value: object) -> None:
    """Keep a result; when there are too many all are forgotten, which costs less than to order them."""
    if len(memory) >= _MAX_REMEMBERED:
        memory.clear()
    memory[key] = value
