"""Where a server listens, whom it lets in, and where it finds vectors. Knows no server."""

import base64
import hashlib
import hmac
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from steermoe.errors import ModelError

KEY_VARIABLES = ("STEERMOE_API_KEY", "VLLM_API_KEY")


@dataclass(frozen=True)
class ServerOptions:
    """Where a server listens, whom it lets in, and where it finds vectors.

    Attributes:
        host: the address; 127.0.0.1 admits only this machine.
        port: the port.
        api_keys: a request must carry one of these keys; if there are none, everyone who reaches the port is let in.
        vectors: a folder of vectors to search first. The server searches it at each request, so vectors may be added
            while it runs.
        any_model: also take vectors that were built for another model of the same shape.

    Raises:
        ModelError: an empty key, which would let everyone in.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: Sequence[str] = ()
    vectors: Path | None = None
    any_model: bool = False

    def __post_init__(self) -> None:
        check_keys(self.api_keys)


def check_keys(keys: Sequence[str]) -> None:
    """Raise ModelError for an empty key, given here or in the environment: vLLM would let everyone in."""
    if not all(key.strip() for key in keys):
        raise ModelError("--api-key is empty, which would let everyone in: give a key, or leave the option out")
    for name in KEY_VARIABLES if not keys else ():
        if not os.environ.get(name, "a key").strip():
            raise ModelError(f"${name} is empty, which would let everyone in: set it to a key, or unset it")


class Keys:
    """Checks whether a request carries a key, in a time that does not depend on how much of it is right.

    Args:
        keys: if there are none, all may in.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def admit(self, authorization: str | None) -> bool:
        """Whether a request may in, by its header `Authorization: Bearer KEY`, or `Basic` with the key as password."""
        if not self._digests:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        kind = scheme.lower()
        given = _digest(_password(key) if kind == "basic" else key.strip())
        found = [hmac.compare_digest(given, digest) for digest in self._digests]
        return kind in ("bearer", "basic") and any(found)


def _password(credentials: str) -> str:
    """The password in what a browser sends; "", which is no key, if there is none."""
    with suppress(ValueError):
        return (
            base64.b64decode(credentials.strip(), validate=True)
            .decode("utf-8", errors="surrogateescape")
            .partition(":")[2]
        )
    return ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", errors="surrogateescape")).digest()
