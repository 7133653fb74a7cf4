"""embed(): texts and what the caller wants of them to vectors, in the order of the inputs."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mlx_embeddings_backends.base import Item, ModelInfo, Truncate
from mlx_embeddings_backends.errors import EmptyInput, InputError, InputTooLong, InvalidTokenId
from mlx_embeddings_server.engine.queue import QueueFull
from mlx_embeddings_server.engine.worker import InferenceFailed, NonFiniteVector, WorkerLost
from mlx_embeddings_server.errors import InternalError, InvalidRequest, Overloaded, Unavailable, quoted
from mlx_embeddings_server.inputs.parse import Content
from mlx_embeddings_server.inputs.token_encoding import TokenDecoder
from mlx_embeddings_server.metrics import Metrics
from mlx_embeddings_server.models import ServedModel
from mlx_embeddings_server.settings import DimensionsPolicy

# The names that checkpoints give a role's prompt, in sentence-transformers' order; the first that is not empty is used.
_ROLE_PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}
_LONGEST_RETRY_AFTER = 60  # seconds
_MOST_DIMENSIONS = 16_384  # that vectors are filled up to: what a caller asks for takes memory


@dataclass(frozen=True, slots=True)
class EmbedOptions:
    """What the caller wants. None: the model's or the server's own default."""

    input_type: Literal["query", "document"] | None = None
    prompt: str | None = None
    prompt_name: str | None = None
    truncate: Truncate | None = None
    dimensions: int | None = None
    normalize: bool | None = None


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors in the order of the inputs, and the account of what they took."""

    rows: NDArray[np.float32]  # [inputs, dimensions]
    prompt_tokens: int
    truncated: list[int]  # indexes of the inputs that were cut
    provider: str
    tokenize_seconds: float
    queue_seconds: float
    inference_seconds: float


class EmbeddingService:
    """Decides; routes translate. All errors that it raises are `ApiError`s."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        truncate: Truncate,
        dimensions_policy: DimensionsPolicy,
        token_decoder: TokenDecoder | None,
    ) -> None:
        self.dimensions_policy = dimensions_policy
        self._metrics = metrics
        self._truncate = truncate
        self._token_decoder = token_decoder

    async def embed(self, model: ServedModel, contents: Sequence[Content], options: EmbedOptions) -> Embeddings:
        """Duplicates are computed once."""
        info = model.info
        self._check_dimensions(info, options.dimensions)
        contents = await self._decode_token_ids(contents)
        prompt = _prompt(info, options)
        _check_prompt_of_token_ids(contents, prompt, options)
        places: dict[Content, int] = {}
        place_of = [places.setdefault(content, len(places)) for content in contents]
        # Token ids carry no prompt: the model's default one is for texts.
        items = [Item(content, prompt if isinstance(content, str) else "") for content in places]
        with _api_errors(place_of):
            vectors = await model.provider.embed(items, options.truncate or self._truncate)
        rows = self._shape(info, vectors.rows, options)
        if len(places) < len(contents):
            rows = rows[place_of]
        prompt_tokens = sum(vectors.tokens[place] for place in place_of)
        self._metrics.prompt_tokens.labels(model.name).inc(prompt_tokens)
        self._metrics.queue_seconds.labels(model.name).observe(vectors.queue_seconds)
        return Embeddings(
            rows=rows,
            prompt_tokens=prompt_tokens,
            truncated=[index for index, place in enumerate(place_of) if vectors.truncated[place]],
            provider=model.provider.name,
            tokenize_seconds=vectors.tokenize_seconds,
            queue_seconds=vectors.queue_seconds,
            inference_seconds=vectors.inference_seconds,
        )

    async def _decode_token_ids(self, contents: Sequence[Content]) -> Sequence[Content]:
        decoder = self._token_decoder
        if decoder is None or all(isinstance(content, str) for content in contents):
            return contents

        def decode() -> list[Content]:
            return [
                content if isinstance(content, str) else decoder.decode(content, f"input[{index}]")
                for index, content in enumerate(contents)
            ]

        return await asyncio.to_thread(decode)

    def _check_dimensions(self, info: ModelInfo, wanted: int | None) -> None:
        most = {"reduce": info.dimensions, "pad": _MOST_DIMENSIONS}.get(self.dimensions_policy)
        if wanted is not None and most is not None and wanted > most:
            raise InvalidRequest(
                f"dimensions is {wanted}, the most is {most} (the model's vectors have {info.dimensions})",
                param="dimensions",
                code="invalid_value",
            )

    def _shape(self, info: ModelInfo, rows: NDArray[np.float32], options: EmbedOptions) -> NDArray[np.float32]:
        """Slice or pad to the asked dimensions, then normalise."""
        wanted = options.dimensions
        if wanted is not None and self.dimensions_policy != "ignore":
            rows = np.pad(rows[:, :wanted], ((0, 0), (0, max(0, wanted - rows.shape[1]))))
        if info.normalize if options.normalize is None else options.normalize:
            # torch.nn.functional.normalize's floor: a vector of zeros stays one.
            rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        return rows


def _prompt(info: ModelInfo, options: EmbedOptions) -> str:
    """The text put before each input."""
    asked = [name for name in ("input_type", "prompt", "prompt_name") if getattr(options, name) is not None]
    if len(asked) > 1:
        raise InvalidRequest(
            f"{' and '.join(asked)} exclude each other: send one of them", param=asked[1], code="invalid_value"
        )
    if options.prompt is not None:
        return options.prompt
    if options.prompt_name is not None:
        if options.prompt_name not in info.prompts:
            known = ", ".join(info.prompts) or "none"
            raise InvalidRequest(
                f"prompt_name {quoted(options.prompt_name)} is not among the model's prompts: {known}",
                param="prompt_name",
                code="invalid_value",
            )
        return info.prompts[options.prompt_name]
    if options.input_type is not None:
        prompts = (info.prompts.get(name) for name in _ROLE_PROMPTS[options.input_type])
        return next((prompt for prompt in prompts if prompt), "")
    return info.prompts[info.default_prompt] if info.default_prompt else ""


def _check_prompt_of_token_ids(contents: Sequence[Content], prompt: str, options: EmbedOptions) -> None:
    asked = options.input_type or options.prompt or options.prompt_name
    if prompt and asked and not all(isinstance(content, str) for content in contents):
        raise InvalidRequest(
            "a prompt cannot be put before token ids: send texts, or put the prompt's tokens into the ids",
            param="input",
            code="invalid_value",
        )


@contextmanager
def _api_errors(place_of: Sequence[int]) -> Iterator[None]:
    """What a caller is told of what went wrong below. `place_of` has, for each input, the place of its item."""
    try:
        yield
    except InputError as error:
        indexes: defaultdict[int, list[int]] = defaultdict(list)
        for index, place in enumerate(place_of):
            indexes[place].append(index)
        raise _invalid_input(error, indexes) from error
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


def _invalid_input(error: InputError, indexes: Mapping[int, Sequence[int]]) -> InvalidRequest:
    """`indexes` has, for an item's place, the inputs that it came from."""
    match error:
        case InputTooLong():
            details = sorted(
                (
                    {"index": index, "tokens": tokens, "max_tokens": error.max_tokens}
                    for place, tokens in error.lengths
                    for index in indexes[place]
                ),
                key=lambda detail: detail["index"],
            )
            others = f" (and {len(details) - 1} more inputs are too long)" if len(details) > 1 else ""
            remedy = (
                "the prompt leaves no room for a text: send a shorter one"
                if error.prompt_fills
                else 'send shorter inputs, or "truncate": "end" to have them cut'
            )
            return InvalidRequest(
                f"input[{details[0]['index']}] has {details[0]['tokens']} tokens, the model takes {error.max_tokens}"
                f"{others}: {remedy}",
                param="input",
                code="input_too_long",
                details=details,
            )
        case InvalidTokenId():
            return InvalidRequest(
                f"input[{indexes[error.index][0]}] has the token id {error.token_id}, and the model's own vocabulary "
                f"has {error.vocabulary_size}: if a client sends another encoding's ids (LangChain sends cl100k_base), "
                "start the server with --token-encoding, or have the client send texts",
                param="input",
                code="invalid_token_id",
            )
        case EmptyInput():
            where = f"input[{indexes[error.index][0]}]"
            return InvalidRequest(f"{where} gives no tokens: leave it out", param="input", code="empty_input")
    raise error
