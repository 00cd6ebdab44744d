"""Where the service is and how to reach it: plain values, so that every process opens channels of its own."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc

from serving.client import SERVICE, SERVICE_CONFIG

Metadata = tuple[tuple[str, str], ...]

_INFERENCE: Final = "inference.GRPCInferenceService"
_UNLIMITED: Final = -1


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """An address with what it takes to call there. Secrets do not show in its text."""

    target: str
    is_tls: bool = False

    ca: bytes | None = field(default=None, repr=False)
    """Authorities that sign the service's certificate, PEM; those of the system if absent."""

    certificate: bytes | None = field(default=None, repr=False)
    private_key: bytes | None = field(default=None, repr=False)
    api_key: str | None = field(default=None, repr=False)

    token_file: Path | None = None
    """File of a JSON Web Token, which may be replaced while it is used."""

    priority: int | None = None

    retries: bool = False
    """Whether gRPC repeats calls as the client's published configuration says; else each call is one attempt."""

    def channel(self) -> grpc.aio.Channel:
        """Open a channel with a connection of its own; call it inside an event loop."""
        arguments = [
            ("grpc.use_local_subchannel_pool", 1),  # several channels, several connections
            ("grpc.max_receive_message_length", _UNLIMITED),
            ("grpc.max_send_message_length", _UNLIMITED),
            # A service that comes back is noticed within a second, however long it was away.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
            ("grpc.service_config", json.dumps(_service_config() if self.retries else {})),
            ("grpc.enable_retries", int(self.retries)),
        ]
        if not self.is_tls:
            # As in the client: to a proxy of the environment, a key in plaintext would leave this machine.
            has_secret = self.api_key is not None or self.token_file is not None
            return grpc.aio.insecure_channel(
                self.target, [*arguments, *([("grpc.enable_http_proxy", 0)] if has_secret else ())]
            )
        credentials = grpc.ssl_channel_credentials(self.ca, self.private_key, self.certificate)
        return grpc.aio.secure_channel(self.target, credentials, arguments)

    def metadata(self) -> Metadata:
        """Return what goes beside a request now: who calls, and how urgent it is."""
        secret = self.api_key if self.token_file is None else self.token_file.read_text("ascii").strip()
        bearer: Metadata = () if secret is None else (("authorization", f"Bearer {secret}"),)
        return bearer if self.priority is None else (*bearer, ("vae-priority", str(self.priority)))


def _service_config() -> Mapping[str, Any]:
    """Return the client's configuration, for both protocols."""
    methods = [dict(part) for part in SERVICE_CONFIG["methodConfig"]]
    for part in methods:
        if {"service": SERVICE} in part["name"]:
            part["name"] = [*part["name"], {"service": _INFERENCE}]
    return {**SERVICE_CONFIG, "methodConfig": methods}
