"""Which model answers a request: the one that it asks for, or one that may stand in for it."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar, cast, get_args

from fastapi import Request

from mlx_embeddings_server.errors import ApiError, InvalidRequest, quoted
from mlx_embeddings_server.fallbacks import misfit
from mlx_embeddings_server.inputs.parse import has_token_ids
from mlx_embeddings_server.model import Model
from mlx_embeddings_server.routes.requests import disconnects_of, header_of, runtime_of
from mlx_embeddings_server.settings import DimensionsPolicy

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# What a model fails with that another one may not fail with.
_OF_MODEL: Final = frozenset(
    ("provider_failed", "provider_rejected_key", "provider_busy", "model_load_failed", "backend_lost")
)
_OF_FULL_MODEL: Final = "queue_full"
_POLICY_HEADER: Final = "X-Embeddings-Dimensions-Policy"
_MISSING: Final = "missing_required_parameter"


@dataclass(frozen=True, slots=True)
class Answer(Generic[Result]):
    """What came of a request, and which model it came from."""

    model: Model
    result: Result
    asked: Model

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.model is self.asked else {"X-Embeddings-Fallback-From": self.asked.spec.provider}


def asked_model(request: Request, name: str | None, provider: str | None = None, *, or_first: bool = False) -> Model:
    """That of the request's `model`, and of its `provider` or header `x-provider`; without a name the default model.

    `or_first`: without a default the first of all. Raises `InvalidRequest`, `NotFound` or `PermissionDenied`.
    """
    models = runtime_of(request).models
    provider = provider or header_of(request, b"x-provider") or None
    if name is not None:
        return models.asked(name, provider)
    if provider is not None:
        message = "a provider says where, and model is missing, which says what"
        raise InvalidRequest(message, param="model", code=_MISSING)
    model = models.default_or_first if or_first else models.default
    if model is None:
        raise InvalidRequest("model is missing", param="model", code=_MISSING)
    return model


def dimensions_policy_of(request: Request) -> DimensionsPolicy | None:
    """The request's own, if it has one."""
    policy = header_of(request, b"x-embeddings-dimensions-policy") or None
    if policy is not None and policy not in get_args(DimensionsPolicy):
        known = ", ".join(get_args(DimensionsPolicy))
        message = f"the header {_POLICY_HEADER} is {quoted(policy)}, and must be one of {known}"
        raise InvalidRequest(message, param=_POLICY_HEADER, code="invalid_value")
    return cast("DimensionsPolicy | None", policy)


async def on_model(
    request: Request,
    asked: Model,
    use: Callable[[Model], Awaitable[Result]],
    *,
    inputs: Any,
    gives_vectors: bool = True,
) -> Answer[Result]:
    """What `use` makes of the model while it is in use, or of the first fallback that can do it.

    `inputs` is what the request has: token ids mean something else to every model. `gives_vectors`: the reply has some,
    which must fit into the index of those of the model that was asked for.
    """

    async def work() -> Answer[Result]:
        try:
            async with asked:
                return Answer(asked, await use(asked), asked)
        except ApiError as error:
            if not _may_pass_on(error, asked, inputs):
                raise
            return await in_its_place(error)

    async def in_its_place(error: ApiError) -> Answer[Result]:
        misfits = []
        for other in runtime_of(request).models.fallbacks_of(asked):
            try:
                async with other:
                    if gives_vectors and (problem := misfit(asked, other)):
                        misfits.append(problem)
                        continue
                    result = await use(other)
            except ApiError as another:  # also that it does not take what the request asks for: the first says more
                log.info("%s does not stand in for %s: %s", other.name, asked.name, another.code)
                continue
            log.info("%s stands in for %s, which failed: %s", other.name, asked.name, error.code)
            runtime_of(request).metrics.observe_fallback(asked.label, other.label)
            return Answer(other, result, asked)
        if misfits:
            error.message += f"; not taken in its place: {'; '.join(misfits)}"
        raise error

    return await disconnects_of(request).until_gone(request, work())


def _may_pass_on(error: ApiError, asked: Model, inputs: Any) -> bool:
    passes = error.code in _OF_MODEL or (error.code == _OF_FULL_MODEL and asked.spec.fallback_when_full)
    return passes and bool(asked.spec.fallback) and not has_token_ids(inputs)
