"""JSON Web Tokens, one for each user (RFC 7519)."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import jwt
from cachetools import LRUCache
from jwt.exceptions import InvalidSubjectError

from mlx_embeddings_server.auth.caller import Caller, refused
from mlx_embeddings_server.errors import AuthenticationFailed

LEEWAY: Final = 10  # seconds that clocks may differ

# Proxies pass headers of 8 KB. Tokens have some hundred bytes, or two thousand with many claims.
_MAX_TOKEN_CHARACTERS: Final = 8192
_MAX_NAME_CHARACTERS: Final = 255
# Reading a token takes 60 us (HS256) to 200 us (ES256), a fifth to the half of serving a short text.
_MAX_VERIFIED: Final = 10_000

_GET_ANOTHER: Final = "get a new one from whoever issued it"
# PyJWT looks at the signature first: of a token that is not ours no claim is told. Subclasses stand before their bases.
_REFUSALS: Final[tuple[tuple[type[Exception], str, str], ...]] = (
    (jwt.ExpiredSignatureError, "token_expired", "has expired"),
    (jwt.ImmatureSignatureError, "token_not_yet_valid", "is not valid yet: is the clock of its issuer right?"),
    (jwt.InvalidAudienceError, "token_wrong_audience", "is for another audience"),
    (jwt.InvalidIssuerError, "token_wrong_issuer", "is of another issuer"),
    (InvalidSubjectError, "token_malformed", "has a subject that is no text"),
    (jwt.InvalidAlgorithmError, "token_algorithm_refused", "is not signed by the algorithm that this server takes"),
    (jwt.InvalidSignatureError, "token_signature_invalid", "is signed with another key"),
)


@dataclass(frozen=True, slots=True)
class VerifyingKey:
    """`algorithm` is the configuration's: what a token says of itself is only compared with it (RFC 8725, 3.1)."""

    key: Any  # what PyJWT takes: bytes, or cryptography's public key
    algorithm: str


class Keys(Protocol):
    """Where the key is found that must have signed a token."""

    generation: int  # another one where keys have come or gone

    async def find(self, token: str) -> VerifyingKey:
        """Raises `AuthenticationFailed` or `Unavailable`; whatever PyJWT raises of a token that cannot be read."""

    def refresh_if_old(self) -> None:
        """Without waiting for it."""


class SecretKeys:
    """The one secret, for HS256."""

    generation = 0

    def __init__(self, secret: str) -> None:
        """Raises `ValueError` for what is the public half of another kind of key, which everybody may know."""
        try:
            jwt.get_algorithm_by_name("HS256").prepare_key(secret)
        except jwt.InvalidKeyError:
            raise ValueError("is a public key or certificate, no secret: --jwt-jwks takes public keys") from None
        self._key = VerifyingKey(secret.encode(), "HS256")

    async def find(self, token: str) -> VerifyingKey:
        return self._key

    def refresh_if_old(self) -> None:
        pass


class AdminClaim:
    """`NAME`: the claim must be true. `NAME=VALUE`: it must be VALUE, or a list or words with VALUE among them."""

    def __init__(self, text: str) -> None:
        self._name, _, self._value = text.partition("=")

    def holds(self, claims: Mapping[str, Any]) -> bool:
        found = claims.get(self._name)
        if not self._value:
            return found is True
        return self._value in (found.split() if isinstance(found, str) else found if isinstance(found, list) else ())


class TokenAccess:
    """Each token's `sub` is a caller. Tokens that were verified once are known until they expire."""

    takes_api_key = False

    def __init__(self, keys: Keys, *, audience: str | None, issuer: str | None, admin_claim: AdminClaim) -> None:
        self._keys = keys
        self._audience = audience
        self._issuer = issuer
        self._admin_claim = admin_claim
        self._verified: LRUCache[bytes, tuple[Caller, int, int]] = LRUCache(_MAX_VERIFIED)

    async def identify(self, bearer: str | None, api_key: str | None) -> Caller:
        if bearer is None:
            if api_key is not None:
                message = "this server tells its users apart by tokens, and takes no X-API-Key: send"
            else:
                message = "the token is missing: send it as"
            raise refused(f"{message} `Authorization: Bearer TOKEN`", "token_missing")
        if len(bearer) > _MAX_TOKEN_CHARACTERS or not bearer.isascii():
            raise _malformed()
        self._keys.refresh_if_old()
        digest = hashlib.sha256(bearer.encode()).digest()
        known, generation = self._verified.get(digest), self._keys.generation
        if known is not None and known[1] > time.time() and known[2] == generation:
            return known[0]
        caller, expires = await self._verify(bearer)
        self._verified[digest] = caller, expires, generation
        return caller

    async def _verify(self, token: str) -> tuple[Caller, int]:
        """The caller, and when he ceases to be one. Raises `AuthenticationFailed` or `Unavailable`."""
        try:
            key = await self._keys.find(token)
            claims = jwt.decode(
                token,
                key.key,
                algorithms=[key.algorithm],
                audience=self._audience,
                issuer=self._issuer,
                leeway=LEEWAY,
                options={"require": ["exp", "sub"], "verify_aud": self._audience is not None},
            )
        except jwt.MissingRequiredClaimError as error:
            raise _refused("token_claim_missing", f"lacks the claim {error.claim}") from error
        except (jwt.InvalidTokenError, RecursionError) as error:  # the latter by brackets within brackets
            for kind, code, what in _REFUSALS:
                if isinstance(error, kind):
                    raise _refused(code, what) from error
            raise _malformed() from error
        name = claims["sub"]
        if not (0 < len(name) <= _MAX_NAME_CHARACTERS and name.isprintable()):
            what = f"has a subject that is not of 1 to {_MAX_NAME_CHARACTERS} printable characters"
            raise _refused("token_malformed", what)
        return Caller(name, self._admin_claim.holds(claims)), int(claims["exp"]) + LEEWAY


def _refused(code: str, what: str) -> AuthenticationFailed:
    return refused(f"the token {what}: {_GET_ANOTHER}", code, about_token=f"the token {what}")


def _malformed() -> AuthenticationFailed:
    return refused(
        "the token cannot be read: send a JSON Web Token as `Authorization: Bearer TOKEN`",
        "token_malformed",
        about_token="the token cannot be read",
    )
