"""Which models stand in for which, and which of them may."""

from collections.abc import Sequence

from mlx_embeddings_backends.base import Output
from mlx_embeddings_backends.errors import ModelError
from mlx_embeddings_server.model import Model
from mlx_embeddings_server.names import Names
from mlx_embeddings_server.settings import SettingsError


class Fallbacks:
    """Of all models of the file, looked up once. Raises `SettingsError` for what leads to no model."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._of = {model.name: self._found(model) for model in names if model.spec.fallback}

    def of(self, model: Model) -> Sequence[Model]:
        return self._of.get(model.name, ())

    def check(self) -> None:
        """Where both models' dimensions are known. Raises `ModelError`."""
        for name, others in self._of.items():
            model = self._names.get(name)
            for other in others:
                known = dimensions_of(model) is not None and dimensions_of(other) is not None
                if known and (problem := misfit(model, other)):
                    raise ModelError(f"models.{name}.fallback: {problem}")

    def _found(self, model: Model) -> list[Model]:
        """Its own list first, then those of the models in it; each model once."""
        found: list[Model] = []
        waiting = [model]
        for each in waiting:  # which grows
            for reference in each.spec.fallback:
                other, has_own_list = self._resolved(reference, each)
                if has_own_list and other not in waiting:
                    waiting.append(other)
                if other not in (model, *found):
                    found.append(other)
        return found

    def _resolved(self, reference: str, of: Model) -> tuple[Model, bool]:
        """The model, and whether it brings its own list along."""
        if (model := self._names.named(reference)) is not None:
            return model, True
        provider, _, name = reference.partition(":")
        if name and self._names.is_provider(provider) and (model := self._names.at(provider, name)) is not None:
            return model, False
        raise SettingsError(f"models.{of.name}.fallback: there is no model {reference!r}")


def dimensions_of(model: Model) -> int | None:
    """As the file says them, or as they were seen to be."""
    info = model.known_info
    return model.spec.dimensions if info is None else info.dimensions


def _output_of(model: Model) -> Output | None:
    if model.spec.is_remote:
        return "dense"
    return None if model.known_info is None else model.known_info.output


def misfit(asked: Model, other: Model) -> str | None:
    """Why the vectors of `other` cannot stand in for those of `asked`; None: they can.

    Vectors of another size would break an index, or silently spoil it.
    """
    kind, others = _output_of(asked), _output_of(other)
    if None not in (kind, others) and kind != others:
        return f"{other.name!r} gives {others} output, and {asked.name!r} {kind}"
    if asked.spec.fallback_other_dimensions or kind == "rerank":
        return None
    ours, theirs = dimensions_of(asked), dimensions_of(other)
    if ours is None or theirs is None:
        unknown = asked if ours is None else other
        return f"the dimensions of {unknown.name!r} are not known: write `dimensions` of it in the server's file"
    if ours != theirs:
        return (
            f"{other.name!r} has {theirs} dimensions, and {asked.name!r} {ours} (`fallback_other_dimensions: true` in "
            "the server's file allows it)"
        )
    return None
