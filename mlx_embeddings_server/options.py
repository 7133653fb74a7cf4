"""What a caller wants of a model's vectors, and what that means for the model that was asked."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_embeddings_backends.base import ModelInfo, Output, Role, Truncate
from mlx_embeddings_server.errors import InvalidInput, InvalidRequest, quoted
from mlx_embeddings_server.inputs.parse import Content, ImageSource
from mlx_embeddings_server.model import Model
from mlx_embeddings_server.pooling import Pool
from mlx_embeddings_server.settings import DimensionsPolicy

# The names that checkpoints give a role's prompt, in sentence-transformers' order; the first that is not empty is used.
_ROLE_PROMPTS: dict[Role, tuple[str, ...]] = {"query": ("query",), "document": ("document", "passage", "corpus")}
# The adapter that takes a role's inputs where there is one of that name (SPECTER2's); else the default does.
_ROLE_ADAPTERS: dict[Role, str] = {"query": "adhoc_query"}
# Where a model of each kind is asked.
_ROUTES: dict[Output, str] = {
    "dense": "/v1/embeddings",
    "multi_vector": "/v1/embeddings",
    "sparse": "/v1/embed_sparse",
    "rerank": "/v1/rerank",
}
_LARGEST_TOKEN_ID = 2**63 - 1


@dataclass(frozen=True, slots=True)
class EmbedOptions:
    """What the caller wants. None: the model's or the server's own default."""

    input_type: Role | None = None
    prompt: str | None = None
    prompt_name: str | None = None
    adapter: str | None = None
    truncate: Truncate | None = None
    dimensions: int | None = None
    normalize: bool | None = None
    pool: Pool | None = None
    token_pool_factor: int | None = None
    with_patches: bool = False
    outputs: tuple[Output, ...] | None = None
    max_active_dims: int | None = None  # of a sparse vector: its largest values
    dimensions_policy: DimensionsPolicy | None = None
    is_cached: bool = True  # results are looked for in the cache, and kept there

    @property
    def role(self) -> Role | None:
        """What texts are embedded as, said by `input_type` or by a prompt of that name."""
        match self.prompt_name:
            case "query" | "document":
                return self.prompt_name
        return self.input_type


def outputs_of(model: Model, options: EmbedOptions) -> tuple[Output, ...]:
    """The kinds of vector that the reply is to have, each once."""
    info = model.info
    if options.outputs is None:
        if info.output == "sparse":
            raise wrong_type(model, "gives sparse vectors: ask /v1/embed_sparse")
        if info.output == "rerank":
            raise wrong_type(model, "scores a query's documents: ask /v1/rerank")
        return (info.output,)
    for output in options.outputs:
        if output not in info.outputs:
            if options.outputs == ("sparse",):
                raise wrong_type(model, f"gives no sparse vectors: ask {_ROUTES[info.output]}")
            if info.output == "rerank":
                raise wrong_type(model, f"gives no vectors: ask {_ROUTES[info.output]}")
            raise invalid_value(f"the model gives {' and '.join(info.outputs)}, not {output}", "outputs")
    return tuple(dict.fromkeys(options.outputs))


def wrong_type(model: Model, what_it_does: str) -> InvalidRequest:
    return InvalidRequest(f"the model {model.name!r} {what_it_does}", param="model", code="wrong_model_type")


def check_pooling(wanted: Sequence[Output], options: EmbedOptions, contents: Sequence[Content], field: str) -> None:
    """`pool`, `token_pool_factor` and `include` where they mean something."""
    asked = [name for name in ("token_pool_factor", "pool") if getattr(options, name) is not None]
    if "multi_vector" not in wanted and (asked or options.with_patches):
        param = asked[0] if asked else "include"
        raise invalid_value(f"{param} is for multi-vector models, and for outputs with multi_vector", param)
    if len(asked) > 1:
        raise invalid_value("token_pool_factor and pool exclude each other: send one of them", "pool")
    if asked and options.normalize is False:
        raise invalid_value(f"{asked[0]} gives vectors of length 1: leave normalize out", "normalize")
    if options.with_patches and (options.token_pool_factor or 1) > 1:
        raise invalid_value("clusters of tokens are no patches: leave include out, or token_pool_factor", "include")
    if options.pool is not None:
        for index, content in enumerate(contents):
            if not isinstance(content, ImageSource):
                raise invalid_value(f"pool is over an image's patches, and {field}[{index}] is no image", "pool")


def check_truncate(model: Model, truncate: Truncate | None) -> None:
    """What another server tokenises cannot be cut here."""
    if model.spec.is_remote and truncate not in (None, "none"):
        raise invalid_value(
            f"truncate is for models that run here, and {model.name!r} runs at {model.spec.provider}: send shorter "
            "inputs",
            "truncate",
        )


def check_token_ids(contents: Sequence[Content], field: str) -> None:
    """Of another server's model, whose vocabulary nobody knows here: what a request there can hold."""
    for index, content in enumerate(contents):
        if isinstance(content, tuple) and not 0 <= min(content) <= max(content) <= _LARGEST_TOKEN_ID:
            wrong = next(each for each in content if not 0 <= each <= _LARGEST_TOKEN_ID)
            shown = wrong if abs(wrong) < 10**40 else "of more than 40 digits"
            raise InvalidInput(
                f"{field}[{index}]", f"has the token id {shown}, which is in no vocabulary", code="invalid_token_id"
            )


def prompt_of(info: ModelInfo, options: EmbedOptions) -> str:
    """The text put before each input."""
    asked = [name for name in ("input_type", "prompt", "prompt_name") if getattr(options, name) is not None]
    if len(asked) > 1:
        raise invalid_value(f"{' and '.join(asked)} exclude each other: send one of them", asked[1])
    if options.prompt is not None:
        return options.prompt
    if options.prompt_name is not None:
        if options.prompt_name not in info.prompts:
            known = ", ".join(info.prompts) or "none"
            raise invalid_value(
                f"prompt_name {quoted(options.prompt_name)} is not among the model's prompts: {known}", "prompt_name"
            )
        return info.prompts[options.prompt_name]
    if options.input_type is not None:
        prompts = (info.prompts.get(name) for name in _ROLE_PROMPTS[options.input_type])
        return next((prompt for prompt in prompts if prompt), "")
    return info.prompts[info.default_prompt] if info.default_prompt else ""


def adapter_of(info: ModelInfo, options: EmbedOptions) -> str | None:
    """The name of the adapter for all inputs. None: the model's default."""
    if options.adapter is not None:
        if options.adapter not in info.adapters:
            known = ", ".join(info.adapters) or "none"
            raise invalid_value(
                f"adapter {quoted(options.adapter)} is not among the model's adapters: {known}", "adapter"
            )
        return options.adapter
    wanted = _ROLE_ADAPTERS.get(options.role) if options.role else None
    return wanted if wanted in info.adapters else None


def check_prompt_has_text(contents: Sequence[Content], prompt: str, options: EmbedOptions, field: str) -> None:
    """A prompt that was asked for must not get lost."""
    asked = options.input_type or options.prompt or options.prompt_name
    if prompt and asked and any(isinstance(content, tuple) for content in contents):
        raise invalid_value(
            "a prompt cannot be put before token ids: send texts, or put the prompt's tokens into the ids", field
        )
    if options.prompt and any(isinstance(content, ImageSource) for content in contents):
        raise invalid_value(
            'a prompt is put before texts: to give an image a text, send {"image": ..., "text": ...}', "prompt"
        )


def invalid_value(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="invalid_value")
