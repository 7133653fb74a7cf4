"""What a caller is told of what went wrong in the engine, or in a model's backend."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mlx_embeddings_backends.errors import (
    EmptyInput,
    InputError,
    InputTooLong,
    InvalidImage,
    InvalidTokenId,
    MissingEndToken,
    QueryTooLong,
    ReservedTokenId,
)
from mlx_embeddings_server.engine.queue import QueueFull
from mlx_embeddings_server.engine.worker import InferenceFailed, NonFiniteVector, WorkerLost
from mlx_embeddings_server.errors import (
    ApiError,
    BadGateway,
    InternalError,
    InvalidInput,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from mlx_embeddings_server.providers.base import (
    InputRefused,
    KeyRejected,
    ProviderBusy,
    ProviderFailed,
    ShuttingDown,
)

_LONGEST_RETRY_AFTER = 60  # seconds


@contextmanager
def as_api_errors(field: str, place_of: Sequence[int]) -> Iterator[None]:
    """`place_of` has, for each input of the request's `field`, the place of the item that it became.

    An item that is no input's is the query.
    """
    try:
        yield
    except InputError as error:
        raise _invalid_input(error, field, _indexes(place_of)) from error
    except QueueFull as error:
        retry_after = min(max(1, round(error.retry_after)), _LONGEST_RETRY_AFTER)
        message = f"the server is full: {error}; try again in {retry_after} s"
        raise Overloaded(message, retry_after=retry_after) from error
    except NonFiniteVector as error:
        message = "the model gave a vector with NaN or infinity, which is not returned"
        raise InternalError(message, code="non_finite_vector") from error
    except InferenceFailed as error:
        message = "the model failed on an input; the server's log says why"
        raise InternalError(message, code="inference_failed") from error
    except WorkerLost as error:
        raise Unavailable(f"{error}: try again later", code="backend_lost") from error
    except ShuttingDown as error:
        raise Unavailable("the server is shutting down", code="shutting_down") from error
    except (ProviderFailed, ProviderBusy, InputRefused) as error:
        raise _of_provider(error, field, place_of) from error


def _of_provider(error: ProviderFailed | ProviderBusy | InputRefused, field: str, place_of: Sequence[int]) -> ApiError:
    """503 for what may pass by itself, 502 for what does not."""
    match error:
        case InputRefused(lengths=[_, *_]):
            too_long = InputTooLong(error.lengths, error.max_tokens)
            return _too_long(too_long, field, _indexes(place_of), remedy="send shorter inputs")
        case InputRefused():
            code = "input_too_long" if error.is_too_long else "provider_refused_input"
            said = f": {error}" if str(error) else ""
            return InvalidRequest(f"the model's provider refuses the {field}{said}", param=field, code=code)
        case ProviderBusy():
            return Overloaded(f"{error}; try again later", retry_after=1, code="provider_busy")
        case KeyRejected():
            return BadGateway(str(error), code="provider_rejected_key")
        case ProviderFailed(is_temporary=True):
            seconds = None if error.retry_after is None else max(1, round(error.retry_after))
            headers = {} if seconds is None else {"Retry-After": str(seconds)}
            return Unavailable(f"{error}; try again later", code="provider_failed", headers=headers)
    return BadGateway(str(error))


def _indexes(place_of: Sequence[int]) -> Mapping[int, Sequence[int]]:
    """For an item's place, the inputs that it came from."""
    indexes: defaultdict[int, list[int]] = defaultdict(list)
    for index, place in enumerate(place_of):
        indexes[place].append(index)
    return indexes


def _invalid_input(error: InputError, field: str, indexes: Mapping[int, Sequence[int]]) -> InvalidInput:
    """`indexes` is of `_indexes`."""
    if isinstance(error, QueryTooLong):
        message = (
            f"leaves no room for a document of the {error.max_tokens} tokens that the model takes, and only documents "
            "are ever cut: send a shorter one"
        )
        return InvalidInput("query", message, code="input_too_long")
    if isinstance(error, InputTooLong):
        return _too_long(error, field, indexes)
    match error:
        case ReservedTokenId():
            code = "invalid_token_id"
            message = (
                f"has the token id {error.token_id}, which stands for a part of an image: send the image itself, as "
                '{"image": ...}'
            )
        case InvalidTokenId():
            code = "invalid_token_id"
            message = (
                f"has the token id {error.token_id}, and the model's own vocabulary has {error.vocabulary_size}: if a "
                "client sends another encoding's ids (LangChain sends cl100k_base), start the server with "
                "--token-encoding, or have the client send texts"
            )
        case MissingEndToken():
            code = "invalid_token_id"
            message = (
                f"lacks the token id {error.token_id}, which ends a text: the model takes that token's vector for the "
                "whole text's"
            )
        case EmptyInput():
            code, message = "empty_input", "gives no tokens: leave it out"
        case InvalidImage():
            code, message = "invalid_image", f"is no image that can be taken: {error}"
        case _:
            raise error
    return InvalidInput(_where(field, indexes, error.index), message, code=code)


def _where(field: str, indexes: Mapping[int, Sequence[int]], place: int) -> str:
    return f"{field}[{indexes[place][0]}]" if place in indexes else "query"


def _too_long(
    error: InputTooLong, field: str, indexes: Mapping[int, Sequence[int]], remedy: str | None = None
) -> InvalidInput:
    details: list[dict[str, Any]] = sorted(
        (
            {"index": index, "tokens": tokens, "max_tokens": error.max_tokens}
            for place, tokens in error.lengths
            for index in indexes.get(place, ())
        ),
        key=lambda detail: detail["index"],
    )
    others = f" (and {len(details) - 1} more inputs are too long)" if len(details) > 1 else ""
    remedy = remedy or (
        "the prompt or the query leaves no room for the text: send a shorter one"
        if error.prompt_fills
        else 'send shorter inputs, or "truncate": "end" to have them cut'
    )
    where = f"{field}[{details[0]['index']}]" if details else "query"
    tokens = details[0]["tokens"] if details else error.lengths[0][1]
    return InvalidInput(
        where,
        f"has {tokens} tokens, the model takes {error.max_tokens}{others}: {remedy}",
        code="input_too_long",
        details=details or None,
    )
