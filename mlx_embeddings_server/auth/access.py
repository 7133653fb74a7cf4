"""The way of telling callers apart that the settings ask for."""

import logging

from mlx_embeddings_server.auth.caller import Access
from mlx_embeddings_server.auth.keys import KeyAccess, read_secret
from mlx_embeddings_server.setting_combinations import ACCESS, flag
from mlx_embeddings_server.setting_types import check_jwt_secret, check_key
from mlx_embeddings_server.settings import Settings, SettingsError

log = logging.getLogger(__name__)

_SHORTEST_KEY = 16  # characters: one that is kept in a file needs not be remembered


def access_of(settings: Settings) -> Access | None:
    """None where everybody may call. Of `settings` that fit together; raises `SettingsError` for one that is wrong."""
    match [name for name in ACCESS if getattr(settings, name) is not None]:
        case ["api_key"] if settings.api_key is not None:
            key = settings.api_key.get_secret_value()
            if len(key) < _SHORTEST_KEY:
                log.warning(
                    "the API key has %d characters, and can be guessed: take %d or more", len(key), _SHORTEST_KEY
                )
            return KeyAccess(key)
        case ["api_key_file"]:
            return KeyAccess(_key_of_file(str(settings.api_key_file)))
        case ["jwt_secret" | "jwt_secret_file" | "jwt_jwks"]:
            return _token_access(settings)
    return None


def _key_of_file(path: str) -> str:
    try:
        key = check_key(read_secret(path))
        if len(key) < _SHORTEST_KEY:
            raise ValueError(f"has a key of {len(key)} characters, and should have one of {_SHORTEST_KEY} or more")
    except ValueError as error:
        raise SettingsError(f"--api-key-file: {error}") from error
    return key


def _token_access(settings: Settings) -> Access:
    """Raises `SettingsError`."""
    # Only now: PyJWT and cryptography take a tenth of a second to import.
    from mlx_embeddings_server.auth import jwks, tokens

    place = settings.jwt_jwks
    try:
        if place is not None:
            is_url = "://" in place
            keys: tokens.Keys = jwks.from_url(place) if is_url else jwks.from_file(place)
        elif settings.jwt_secret is not None:
            keys = tokens.SecretKeys(settings.jwt_secret.get_secret_value())
        else:
            keys = tokens.SecretKeys(check_jwt_secret(read_secret(str(settings.jwt_secret_file))))
    except (ValueError, jwks.KeySetError) as error:
        source = next(name for name in ACCESS if getattr(settings, name) is not None)
        raise SettingsError(f"{flag(source)}: {error}") from error
    if place is not None and settings.jwt_audience is None:
        log.warning("every token of the issuer is taken, those for other services too: --jwt-audience says whose are")
    return tokens.TokenAccess(
        keys,
        audience=settings.jwt_audience,
        issuer=settings.jwt_issuer,
        admin_claim=tokens.AdminClaim(settings.jwt_admin_claim),
    )
