"""Which of the models that are served may be used."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from mlx_embeddings_server.errors import PermissionDenied
from mlx_embeddings_server.model import Model
from mlx_embeddings_server.names import Names
from mlx_embeddings_server.provider_entry import LOCAL_NAMES
from mlx_embeddings_server.providers import LOCAL
from mlx_embeddings_server.settings import SettingsError


class AllowList:
    """Of models and of providers, for everybody. None: all of them."""

    def __init__(self, names: Names, models: Sequence[str], providers: Sequence[str]) -> None:
        """`models` are as requests name them, with `*` for anything. Raises `SettingsError` for what is not served."""
        self.models = models or None
        self.providers = providers or None
        spellings = {model.name: names.spellings(model) for model in names}
        for pattern in models:
            if not names.takes_any(pattern) and not any(_fits(each, [pattern]) for each in spellings.values()):
                served = ", ".join(spellings) or "none"
                raise SettingsError(f"--allowed-models {pattern}: no such model is served; served: {served}")
        for provider in providers:
            if not names.is_provider(provider):
                known = ", ".join(names.providers)
                raise SettingsError(f"--allowed-providers {provider}: there is no such provider; known: {known}")
        self._names = {name for name, each in spellings.items() if _fits(each, models)}
        if not any(map(self.allows, names)) and not any(map(names.takes_any, models or ("*:",))):
            raise SettingsError("--allowed-models and --allowed-providers together leave no model that may be used")

    def allows_provider(self, name: str) -> bool:
        """Of `local` and the file's."""
        names = LOCAL_NAMES if name == LOCAL else (name,)
        return self.providers is None or any(each in self.providers for each in names)

    def allows(self, model: Model) -> bool:
        if not self.allows_provider(model.spec.provider):
            return False
        # What a caller named at a provider that takes any is not among the names.
        return self.models is None or model.name in self._names or _fits([model.name], self.models)

    def check(self, model: Model) -> None:
        """Raises `PermissionDenied`."""
        if not self.allows(model):
            raise PermissionDenied(
                f"the model {model.name!r} is served here, and not allowed: choose another, or ask whoever runs the "
                "server",
                param="model",
                code="model_not_allowed",
            )


def _fits(spellings: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(each, pattern) for each in spellings for pattern in patterns)
