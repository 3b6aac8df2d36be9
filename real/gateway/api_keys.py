"""API keys of clients: kept only as hashes, compared in constant time, never printed."""

import hashlib
import os
from collections.abc import Iterable
from hmac import compare_digest

_BEARER = b"bearer "


class ApiKeys:
    """The keys a gateway accepts; with none, it accepts everyone."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = tuple(_digest(key.encode("utf-8", "surrogateescape")) for key in keys if key)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, authorization: bytes | None) -> bool:
        """Whether an Authorization header carries one of the keys; always when there are none."""
        if not self._digests:
            return True
        if authorization is None or authorization[: len(_BEARER)].lower() != _BEARER:
            return False
        given = _digest(authorization[len(_BEARER) :].strip())
        matches = [compare_digest(given, digest) for digest in self._digests]  # all of them: no early end to time
        return any(matches)


def keys_from_environment(variable: str | None) -> ApiKeys:
    """Return the keys in an environment variable, commas between them; none for None.

    Raises:
        ValueError: the variable is unset or empty.
    """
    if variable is None:
        return ApiKeys()
    keys = ApiKeys(key.strip() for key in os.environ.get(variable, "").split(","))
    if not keys:
        raise ValueError(
            f"serve.api_key_env names {variable}, which is not set; export it with the keys, or leave it out"
        )
    return keys


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
