"""What the rest of the server knows of who calls."""

from dataclasses import dataclass
from typing import Protocol

from mlx_embeddings_server.errors import AuthenticationFailed, PermissionDenied


@dataclass(frozen=True, slots=True)
class Caller:
    """`name` is what limits and collections go by; an admin may load and unload models, and see what all do."""

    name: str
    is_admin: bool


# Everybody, where no key is set.
ANONYMOUS = Caller("anonymous", is_admin=True)


class Access(Protocol):
    """One way of telling callers apart."""

    takes_api_key: bool  # and not `Authorization: Bearer` alone

    async def identify(self, bearer: str | None, api_key: str | None) -> Caller:
        """By the token of `Authorization: Bearer` and by `X-API-Key`. Raises `AuthenticationFailed`, `Unavailable`."""


def refused(message: str, code: str, *, about_token: str | None = None) -> AuthenticationFailed:
    """401, with the challenge that RFC 6750 wants: with an error only where there was a token."""
    challenge = "Bearer"
    if about_token is not None:
        challenge = f'Bearer error="invalid_token", error_description="{about_token}"'
    return AuthenticationFailed(message, code=code, headers={"WWW-Authenticate": challenge})


def check_admin(caller: Caller) -> None:
    """Raises `PermissionDenied`."""
    if not caller.is_admin:
        raise PermissionDenied("this is for admins: ask whoever runs the server")
