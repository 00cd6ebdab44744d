"""An issuer of JSON Web Tokens for tests, honest and dishonest, and a server of its keys."""

import base64
import contextlib
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

ISSUER = "https://issuer.test"
AUDIENCE = "vae"

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


class Signer(NamedTuple):
    """One key of an issuer."""

    kid: str
    algorithm: str
    key: PrivateKey

    @classmethod
    def make(cls, kid: str, algorithm: str = "ES256", *, bits: int = 2048) -> "Signer":
        """Return a new key for an algorithm."""
        key: PrivateKey
        if algorithm.startswith("RS"):
            key = rsa.generate_private_key(65537, bits)
        elif algorithm.startswith("ES"):
            key = ec.generate_private_key(ec.SECP256R1())
        else:
            key = ed25519.Ed25519PrivateKey.generate()
        return cls(kid, algorithm, key)

    def jwk(self, **fields: object) -> dict[str, Any]:
        """Return the public key as an entry of a key set."""
        public: Any = self.key.public_key()
        kind: Any = {"R": RSAAlgorithm, "E": ECAlgorithm}[self.algorithm[0]]
        if self.algorithm == "EdDSA":
            kind = OKPAlgorithm
        return {**json.loads(kind.to_jwk(public)), "kid": self.kid, **fields}

    def pem(self) -> bytes:
        """Return the public key in PEM: what an attacker would sign with."""
        return self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def token(self, headers: Mapping[str, Any] | None = None, **claims: Any) -> str:  # noqa: ANN401 - of any type, wrong ones too
        """Return a token that is valid unless claims or headers say otherwise; None leaves one out."""
        given = claims_for(**claims)
        both = {"kid": self.kid, **(headers or {})}
        present = {name: value for name, value in both.items() if value is not None}
        return jwt.encode(given, self.key, self.algorithm, headers=present)


def claims_for(**claims: Any) -> dict[str, Any]:  # noqa: ANN401 - as above
    """Return valid claims with others over them; None leaves one out."""
    default = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": int(time.time()) + 86_400}
    return {name: value for name, value in (default | claims).items() if value is not None}


def key_set(*signers: Signer) -> bytes:
    """Return the key set of some keys."""
    return json.dumps({"keys": [signer.jwk() for signer in signers]}).encode()


def forge(header: Mapping[str, Any], claims: Mapping[str, Any], *, secret: bytes | None = None) -> str:
    """Return a token as an attacker makes it: unsigned, or signed with a secret as HS256."""
    parts = ".".join(_encode(json.dumps(part).encode()) for part in (header, claims))
    signature = hmac.new(secret, parts.encode(), hashlib.sha256).digest() if secret is not None else b""
    return f"{parts}.{_encode(signature)}"


def tamper(token: str, **claims: object) -> str:
    """Return a token with other claims under the old signature."""
    header, payload, signature = token.split(".")
    padded = payload + "=" * (-len(payload) % 4)
    changed = json.loads(base64.urlsafe_b64decode(padded)) | claims
    return f"{header}.{_encode(json.dumps(changed).encode())}.{signature}"


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


class KeyServer:
    """Answers with a key set, and counts how often it was asked."""

    def __init__(self, body: bytes) -> None:
        self.body, self.headers, self.status = body, dict[str, str](), 200
        self.num_requests = 0
        self.url = ""
        self.answers = threading.Event()
        self.answers.set()


@contextlib.contextmanager
def serving_keys(body: bytes) -> Iterator[KeyServer]:
    """Run a server of a key set on loopback."""
    state = KeyServer(body)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.num_requests += 1
            state.answers.wait(10)
            self.send_response(state.status)
            for name, value in state.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(state.body)

        def log_message(self, *_: object) -> None:
            """Be quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}/keys"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
