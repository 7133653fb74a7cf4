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
from mlx_embeddings_server.errors import InternalError, InvalidInput, Overloaded, Unavailable

_LONGEST_RETRY_AFTER = 60  # seconds


@contextmanager
def as_api_errors(field: str, place_of: Sequence[int]) -> Iterator[None]:
    """`place_of` has, for each input of the request's `field`, the place of the item that it became.

    An item that is no input's is the query.
    """
    try:
        yield
    except InputError as error:
        indexes: defaultdict[int, list[int]] = defaultdict(list)
        for index, place in enumerate(place_of):
            indexes[place].append(index)
        raise _invalid_input(error, field, indexes) from error
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


def _invalid_input(error: InputError, field: str, indexes: Mapping[int, Sequence[int]]) -> InvalidInput:
    """`indexes` has, for an item's place, the inputs that it came from."""
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


def _too_long(error: InputTooLong, field: str, indexes: Mapping[int, Sequence[int]]) -> InvalidInput:
    details: list[dict[str, Any]] = sorted(
        (
            {"index": index, "tokens": tokens, "max_tokens": error.max_tokens}
            for place, tokens in error.lengths
            for index in indexes.get(place, ())
        ),
        key=lambda detail: detail["index"],
    )
    others = f" (and {len(details) - 1} more inputs are too long)" if len(details) > 1 else ""
    remedy = (
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
