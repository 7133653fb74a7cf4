"""Settings that exclude each other or mean nothing without another, which none of them can tell alone."""

from mlx_embeddings_server.settings import Settings, SettingsError

ACCESS = ("api_key", "api_key_file", "jwt_secret", "jwt_secret_file", "jwt_jwks")
_OF_TOKENS = ("jwt_audience", "jwt_issuer", "jwt_admin_claim")
_OF_JOBS = ("reembed_worker", "jobs_url")


def check_combinations(settings: Settings) -> None:
    """Raises `SettingsError`."""
    given = [name for name in ACCESS if getattr(settings, name) is not None]
    if len(given) > 1:
        raise SettingsError(f"{' and '.join(map(flag, given))} exclude each other: callers are told apart in one way")
    stray = [name for name in _OF_TOKENS if name in settings.model_fields_set]
    if stray and not (given and given[0].startswith("jwt")):
        raise SettingsError(f"{flag(stray[0])} is about tokens: give --jwt-secret, --jwt-secret-file or --jwt-jwks too")
    if settings.cache_url is not None and not settings.cache:
        raise SettingsError("--cache-url is of use with --cache alone: add it, or drop the URL")
    if settings.rate_limit_storage is not None and not limits_rates(settings):
        raise SettingsError("--rate-limit-storage is of use with --rate-limit alone: add it, or drop the URL")
    if settings.collections is None:
        stray = sorted(name for name in settings.model_fields_set if name.startswith("collections_"))
        stray += [name for name in _OF_JOBS if getattr(settings, name)]
        if stray:
            raise SettingsError(
                f"{flag(stray[0])} is of use with --collections alone: add it, such as --collections chroma"
            )


def limits_rates(settings: Settings) -> bool:
    if "rate_limit" in settings.model_fields_set:
        return settings.rate_limit
    return settings.rate_limit_requests is not None or settings.rate_limit_tokens is not None


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
