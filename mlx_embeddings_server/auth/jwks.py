"""Public keys of tokens, from a JSON Web Key Set (RFC 7517): a file, or the URL where an identity provider has it."""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from mlx_embeddings_server.auth.caller import refused
from mlx_embeddings_server.auth.tokens import VerifyingKey
from mlx_embeddings_server.errors import Unavailable, quoted

log = logging.getLogger(__name__)

Fetch = Callable[[], Awaitable[bytes]]  # the set as it is now; raises `KeySetError`

REFRESH_SECONDS: Final = 10.0  # between two fetches: whoever sends unknown key ids must not make us flood the issuer
_MAX_AGE: Final = 600.0  # seconds after which keys are fetched again, so that one which was withdrawn goes
_FETCH_TIMEOUT: Final = 5.0  # seconds, for all of it
_MAX_BYTES: Final = 256 * 1024
_MAX_KEYS: Final = 100
_MOST_SHOWN: Final = 5  # ids, in a warning
_SHORTEST_RSA: Final = 2048  # bits (RFC 7518, 3.3)


class KeySetError(Exception):
    """The set cannot be had or read. The message says why, for the log."""


class KeySet:
    """Fetched when a key is asked for that it has not. While it cannot be fetched, the keys that it has go on."""

    def __init__(
        self,
        fetch: Fetch,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.generation = 0
        self._fetch = fetch
        self._clock = clock
        self._keys: Mapping[str | None, VerifyingKey] = {}
        self._passed_over: Sequence[str | None] = ()
        self._fetching: asyncio.Task[None] | None = None
        self._fetched_at = -float("inf")  # or tried to
        self._failed = False

    async def find(self, token: str) -> VerifyingKey:
        """By the token's `kid`; without one it is the only key. Raises `AuthenticationFailed` or `Unavailable`."""
        key_id = jwt.get_unverified_header(token).get("kid")
        if (found := self._get(key_id)) is not None:
            return found
        if self._fetching is not None or self._age >= REFRESH_SECONDS:
            await asyncio.shield(self._start_fetch())  # of which others wait for the same
            if (found := self._get(key_id)) is not None:
                return found
        if self._failed:
            raise Unavailable(
                "the keys that tokens are checked with cannot be fetched now: try again later",
                code="token_keys_unavailable",
                headers={"Retry-After": str(round(REFRESH_SECONDS))},
            )
        what = "names no key (kid)" if key_id is None else "is signed with a key that is not its issuer's"
        raise refused(f"the token {what}", "token_signature_invalid", about_token=f"the token {what}")

    def refresh_if_old(self) -> None:
        if self._keys and self._age >= (REFRESH_SECONDS if self._failed else _MAX_AGE):
            self._start_fetch()

    async def refresh(self) -> None:
        """Raises `KeySetError`; the keys are as they were then."""
        self._fetched_at, self._failed = self._clock(), True
        self.take(await self._fetch())
        self._failed = False

    def take(self, content: bytes) -> None:
        """The set in the place of that before; one without keys means that nobody signs any more.

        Raises `KeySetError`; the keys are as they were then.
        """
        keys, passed_over = _parse(content)
        if passed_over and passed_over != self._passed_over:
            ids = ", ".join("none" if each is None else quoted(each) for each in passed_over[:_MOST_SHOWN])
            log.warning("--jwt-jwks: of keys with the same id (kid) the first is used, the others are not: %s", ids)
        self._passed_over = passed_over
        if keys.keys() != self._keys.keys() or any(not _same(keys[each], self._keys[each]) for each in keys):
            self._keys = keys
            self.generation += 1

    @property
    def has_keys(self) -> bool:
        return bool(self._keys)

    def _get(self, key_id: str | None) -> VerifyingKey | None:
        if key_id is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        return self._keys.get(key_id)

    @property
    def _age(self) -> float:
        return self._clock() - self._fetched_at

    def _start_fetch(self) -> asyncio.Task[None]:
        if self._fetching is None:
            self._fetching = asyncio.create_task(self._try_refresh())
        return self._fetching

    async def _try_refresh(self) -> None:
        try:
            await self.refresh()
        except KeySetError as error:
            log.warning("--jwt-jwks: %s; tokens with keys that are known are still taken", error)
        finally:
            self._fetching = None


def from_url(url: str, *, clock: Callable[[], float] = time.monotonic) -> KeySet:
    """Fetched when the first token comes. Redirects are not followed: whom to trust is for the settings to say."""

    async def fetch() -> bytes:
        try:
            async with asyncio.timeout(_FETCH_TIMEOUT), _client(url) as client, client.stream("GET", url) as reply:
                return await _body(url, reply)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, TimeoutError) as error:
            raise KeySetError(f"{_host(url)} cannot be reached: {str(error) or type(error).__name__}") from error

    return KeySet(fetch, clock=clock)


def from_file(path: str) -> KeySet:
    """Read now, and again when a token names another key. Raises `KeySetError`, for an empty set too."""
    found = KeySet(lambda: asyncio.to_thread(_read_file, path))
    found.take(_read_file(path))
    if not found.has_keys:
        raise KeySetError(f"{path} has no keys, so nobody could call")
    return found


async def _body(url: str, reply: httpx.Response) -> bytes:
    if reply.status_code != 200:
        raise KeySetError(f"{_host(url)} answered with status {reply.status_code}, not 200")
    body = bytearray()
    async for chunk in reply.aiter_bytes():
        body += chunk
        if len(body) > _MAX_BYTES:
            raise KeySetError(f"{_host(url)} sent more than {_MAX_BYTES} bytes")
    return bytes(body)


def _read_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise KeySetError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from error
    if len(content) > _MAX_BYTES:
        raise KeySetError(f"{path} has more than {_MAX_BYTES} bytes")
    return content


def _parse(content: bytes) -> tuple[dict[str | None, VerifyingKey], list[str | None]]:
    """The keys for RS256 and ES256 by their ids, and the ids of further keys that have one of these too.

    Raises `KeySetError` where it has keys, and none of these.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    given = found.get("keys") if isinstance(found, dict) else None
    if not isinstance(given, list):
        raise KeySetError('what it has is no JSON Web Key Set, {"keys": [...]}')
    keys: dict[str | None, VerifyingKey] = {}
    passed_over: list[str | None] = []
    for each in given[:_MAX_KEYS]:
        if isinstance(each, dict) and (key := _verifying_key(each)) is not None:
            key_id = each["kid"] if isinstance(each.get("kid"), str) else None
            if not _same(keys.setdefault(key_id, key), key):
                passed_over.append(key_id)
    if given and not keys:
        raise KeySetError(f"of its {len(given)} keys none is for RS256 (RSA, {_SHORTEST_RSA} bits) or ES256 (P-256)")
    return keys, passed_over


def _verifying_key(jwk: Mapping[str, Any]) -> VerifyingKey | None:
    """None for what signs no tokens, or in a way that is not ours: secrets, other curves, keys to encrypt with."""
    algorithm, fields = {"RSA": ("RS256", ("n", "e")), "EC": ("ES256", ("crv", "x", "y"))}.get(
        str(jwk.get("kty")), (None, ())
    )
    if algorithm is None or jwk.get("alg", algorithm) != algorithm or jwk.get("use", "sig") != "sig":
        return None
    if algorithm == "ES256" and jwk.get("crv") != "P-256":
        return None
    try:
        # Of a private key, which has no place in a set, the public half.
        key = jwt.PyJWK({"kty": jwk["kty"]} | {name: jwk[name] for name in fields}, algorithm).key
    except (jwt.PyJWTError, ValueError, TypeError, KeyError, AttributeError):
        return None
    if isinstance(key, RSAPublicKey) and key.key_size < _SHORTEST_RSA:
        return None
    return VerifyingKey(key, algorithm)


def _same(one: VerifyingKey, other: VerifyingKey) -> bool:
    return bool(one.key == other.key)


def _client(url: str) -> httpx.AsyncClient:
    # A proxy of the environment is for the world outside, not for this machine.
    return httpx.AsyncClient(timeout=_FETCH_TIMEOUT, trust_env=url.startswith("https:"))


def _host(url: str) -> str:
    """No more of it: the rest may have a secret in it."""
    return urlsplit(url).hostname or "it"
