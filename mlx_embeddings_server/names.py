"""Which model a request means: by name, by alias, by PROVIDER:MODEL, or by a name and a provider."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from mlx_embeddings_server.errors import NotFound, quoted
from mlx_embeddings_server.model import Model
from mlx_embeddings_server.provider_entry import LOCAL_NAMES
from mlx_embeddings_server.providers import LOCAL
from mlx_embeddings_server.providers.endpoint import Endpoint
from mlx_embeddings_server.registry import ModelSpec, ProviderSpec
from mlx_embeddings_server.remote_model import RemoteModel

# Models that callers named at providers which take any: what is kept must not grow with what they type.
_MOST_OTHERS = 100
_LONGEST_NAME = 200


class Names:
    """All models that can be asked for. `aliases` lead to names."""

    def __init__(
        self,
        models: Mapping[str, Model],
        aliases: Mapping[str, str],
        providers: Mapping[str, ProviderSpec],
        endpoints: Mapping[str, Endpoint],
    ) -> None:
        self._models = dict(models)
        self._aliases = aliases
        self._providers = providers
        self._endpoints = endpoints
        self._others: dict[tuple[str, str], RemoteModel] = {}  # the one that was asked for last is the last
        for provider, spec in providers.items():
            for source in spec.models:
                if self._listed_at(provider, source) is None:
                    model = self.make(provider, source)
                    self._models[model.name] = model

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def named(self, name: str) -> Model | None:
        """By served name or alias."""
        return self._models.get(name if name in self._models else self._aliases.get(name, ""))

    def get(self, name: str, provider: str | None = None, *, remembers: bool = True) -> Model:
        """Raises `NotFound` with what there is. `remembers`: a model that nothing lists, as it is going to be used."""
        if provider is None and (model := self.named(name)) is not None:
            return model
        prefix, _, rest = name.partition(":")
        prefixed = self.provider_of(prefix) if rest else None
        if provider is None:
            if prefixed is None:
                return self._only_one_called(name)
            provider, name = prefixed, rest
        else:
            provider = self._asked_provider(provider)
            if provider == prefixed or {provider, prefixed} <= set(LOCAL_NAMES):
                name = rest
        return self._listed_at(provider, name) or self._other_at(provider, name, remembers=remembers)

    def listed(self, model: Model) -> Model:
        """The model of that name, which is listed from now on."""
        if model.name not in self._models:
            self._models[model.name] = self.make(model.spec.provider, model.spec.source)
        return self._models[model.name]

    @property
    def providers(self) -> Sequence[str]:
        return LOCAL, *self._providers

    def is_provider(self, name: str) -> bool:
        return name in self._providers or name in LOCAL_NAMES

    def provider_of(self, name: str) -> str | None:
        """The one that a request means, who may write it in capitals."""
        if self.is_provider(name):
            return name
        known = (*LOCAL_NAMES, *self._providers)
        return next((each for each in known if each.lower() == name.lower()), None)

    def at(self, provider: str, name: str) -> Model | None:
        """That of the file or of the allowed ones; else of a provider elsewhere a new one, which no caller can name."""
        model = self._listed_at(provider, name)
        return self.make(provider, name) if model is None and provider in self._providers else model

    def spellings(self, model: Model) -> list[str]:
        """All that it can be called by, but for what its provider's other names make of these."""
        aliases = [alias for alias, name in self._aliases.items() if name == model.name]
        source, is_remote = model.spec.source, model.spec.is_remote
        providers = [model.spec.provider] if is_remote else LOCAL_NAMES
        at_provider = [f"{provider}:{each}" for provider in providers for each in (model.name, *aliases, source)]
        is_clear = not is_remote or len(self._called(source)) == 1
        return [model.name, *aliases, *at_provider, *([source] if is_clear else [])]

    def takes_any(self, reference: str) -> bool:
        """Whether it may be one of the models that a provider takes without a list."""
        prefix, colon, _ = reference.partition(":")
        return bool(colon) and any(
            spec.any_model and fnmatchcase(name, prefix) for name, spec in self._providers.items()
        )

    def make(self, provider: str, source: str, *, is_listed: bool = True) -> RemoteModel:
        name = f"{provider}:{source}"
        return RemoteModel(
            name, ModelSpec(name, source, provider=provider), self._endpoints[provider], is_listed=is_listed
        )

    def _asked_provider(self, name: str) -> str:
        if (provider := self.provider_of(name)) is None:
            known = ", ".join(self.providers)
            raise NotFound(
                f"there is no provider {quoted(name)} here; known: {known}",
                param="x-provider",
                code="provider_not_found",
            )
        return provider

    def _only_one_called(self, name: str) -> Model:
        """By what its provider elsewhere calls it, if no other model is called so: equal names may be two models.

        What runs here has the name that it was given in the place of its own.
        """
        found = self._called(name)
        if len(found) > 1:
            raise NotFound(
                f"several models are called {quoted(name)} by their providers: ask for one of "
                f"{', '.join(model.name for model in found)}",
                param="model",
                code="model_not_found",
            )
        if not found:
            raise self._unknown(name)
        return found[0]

    def _called(self, name: str) -> list[Model]:
        return [model for model in self if model.spec.is_remote and model.spec.source == name]

    def _listed_at(self, provider: str, name: str) -> Model | None:
        """By its name here, or by what its provider calls it."""
        provider = LOCAL if provider in LOCAL_NAMES else provider
        model = self.named(name)
        if model is not None and model.spec.provider == provider:
            return model
        of_provider = (each for each in self if each.spec.provider == provider)
        return next((each for each in of_provider if name == each.spec.source), None)

    def _other_at(self, provider: str, name: str, *, remembers: bool) -> Model:
        key = provider, name
        if (model := self._others.pop(key, None)) is not None:
            self._others[key] = model
            return model
        is_allowed = provider in self._providers and self._providers[provider].any_model
        if not is_allowed or not name.isprintable() or len(name) > _LONGEST_NAME:
            raise self._unknown(f"{provider}:{name}")
        if not remembers:
            return self.make(provider, name, is_listed=False)
        if len(self._others) >= _MOST_OTHERS:
            # Whoever uses it goes on with it; whoever asks for it next learns its vectors' size again.
            del self._others[next(iter(self._others))]
        model = self._others[key] = self.make(provider, name, is_listed=False)
        return model

    def _unknown(self, name: str) -> NotFound:
        served = ", ".join(self._models)
        any_of = [provider for provider, spec in self._providers.items() if spec.any_model]
        more = f"; and any model of {', '.join(any_of)}, as PROVIDER:MODEL" if any_of else ""
        return NotFound(
            f"the model {quoted(name)} is not served here; served: {served}{more}",
            param="model",
            code="model_not_found",
        )
