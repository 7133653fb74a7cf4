"""Rerankers that are a language model: the answer to a question about a pair, by the logits of a "yes" and a "no".

They are sentence-transformers' Transformer and LogitScore. Loading is that library's; the hot path is ours: padding is
on the right, where no position shifts with it, and of the output layer there are only the rows of the two tokens.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import jinja2
import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mlx_embeddings_backends.base import Backend, Item, LoadOptions, ModelInfo, Pair, Prepared, Truncate
from mlx_embeddings_backends.chat_pairs import ChatPairTokenizer, Render
from mlx_embeddings_backends.errors import DeviceLost, EmptyInput, ModelError, UnsupportedModel
from mlx_embeddings_backends.pairs import PairTokenizer, PairTokens, warm_up
from mlx_embeddings_backends.tokenization import pad
from mlx_embeddings_backends.torch.cross_encoder import BROKEN, activation_of, load_library
from mlx_embeddings_backends.torch.devices import TORCH_DTYPES, batch_tokens, choose_device, choose_dtype, memory_bytes
from mlx_embeddings_backends.torch.mixed_precision import use_mixed_products
from mlx_embeddings_backends.torch.sentence_transformer import check_weights, max_tokens_of

_T = TypeVar("_T")

_TEMPLATE_SECONDS: Final = 10.0
# What they say of a call of the tokenizer that we do not make, or that changes nothing at the last position.
_OF_THE_CALL: Final = {"logits_to_keep", "max_length", "pad_to_multiple_of", "padding", "padding_side", "truncation"}
# What of `apply_chat_template` is no affair of the template's.
_NOT_OF_THE_TEMPLATE: Final = {
    "common_kwargs", "max_length", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors",
    "sanitize_control_tokens", "tokenize", "tokenizer_kwargs", "truncation",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded on the right."""

    ids: Tensor  # int64 [batch, tokens]
    mask: Tensor  # int64 [batch, tokens]


class CausalRerankerBackend(Backend):
    """Items are `Pair`s; what `run` gives of one is its score before the activation that `info` names."""

    def __init__(self, folder: Path, options: LoadOptions) -> None:
        device = choose_device(options.device)
        dtype = choose_dtype(options.dtype, device)
        library = load_library(folder)
        transformer, score = library.children()
        assert isinstance(transformer, Transformer) and isinstance(score, LogitScore)
        _check_transformer(transformer)
        model: Any = transformer.model
        check_weights(model)
        _keep_rows(model, [each for each in (score.true_token_id, score.false_token_id) if each is not None])
        self._tokenizer = _tokenizer_of(transformer)
        self._pad_id = int(transformer.tokenizer.pad_token_id or 0)
        self._device = device
        if dtype != "float32":  # but for the rows above: nothing evens out their roundings
            use_mixed_products(model.base_model, TORCH_DTYPES[dtype])
        self._model: nn.Module = model.to(device)
        self.info = ModelInfo(
            backend="torch",
            device=str(device),
            dtype=dtype,
            dimensions=1,
            max_tokens=self._tokenizer.max_tokens,
            vocabulary_size=model.get_input_embeddings().num_embeddings,
            normalize=False,
            batch_tokens=batch_tokens(device),
            outputs=("rerank",),
            prompts={name: prompt or "" for name, prompt in library.prompts.items()},
            default_prompt=library.default_prompt_name,
            score_activation=activation_of(folder, transformer.config),
            memory_bytes=memory_bytes(self._model),
        )

    def prepare(self, items: Sequence[Item], truncate: Truncate = "none") -> list[Prepared]:
        prepared = self._tokenizer.prepare(items, truncate)
        for index, each in enumerate(prepared):
            if not each.tokens:  # there is no last token to look at
                raise EmptyInput(index)
        return prepared

    def collate(self, batch: Sequence[Prepared]) -> Batch:
        pairs = [cast("PairTokens", prepared.payload) for prepared in batch]
        ids, mask = pad([pair.ids for pair in pairs], self._pad_id, self.info.max_tokens)
        return Batch(torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64)))

    @torch.inference_mode()
    def run(self, batch: Batch) -> NDArray[np.float32]:
        try:
            ids, mask = (each.to(self._device, non_blocking=True) for each in (batch.ids, batch.mask))
            logits = self._model(input_ids=ids, attention_mask=mask).logits  # [batch, tokens, 1 or 2]
            rows = torch.arange(len(ids), device=self._device)
            answers = logits[rows, mask.sum(dim=1) - 1].float()  # [batch, 1 or 2]
            scores = answers[:, :1] - answers[:, 1:] if answers.shape[1] == 2 else answers  # [batch, 1]
            return cast("NDArray[np.float32]", scores.cpu().numpy())
        except torch.AcceleratorError as error:
            # An error in a kernel leaves the CUDA context unusable; running out of memory is another exception.
            raise DeviceLost(str(error)) from error

    def warm_up(self) -> None:
        warm_up(self)


def _check_transformer(transformer: Transformer) -> None:
    """Raises `UnsupportedModel` unless it makes logits of texts, and each text's are its own."""
    if not set(transformer.modality_config) <= {"text", "message"} or not isinstance(
        transformer.processor, PreTrainedTokenizerBase
    ):
        known = ", ".join(map(str, transformer.modality_config))
        raise UnsupportedModel(f"the transformer takes {known}: only texts and messages of texts are known")
    if (transformer.transformer_task, transformer.module_output_name) != ("text-generation", "causal_logits"):
        raise UnsupportedModel(
            f"the transformer has the task {transformer.transformer_task!r} and gives "
            f"{transformer.module_output_name!r}: LogitScore needs 'text-generation' and 'causal_logits'"
        )
    taken = [(each["method"], each["method_output_name"]) for each in transformer.modality_config.values()]
    if any(each != ("forward", "logits") for each in taken):
        raise UnsupportedModel("modality_config takes something else of the model than the logits of its forward")
    if not getattr(transformer.tokenizer, "is_fast", False):
        raise UnsupportedModel("the checkpoint's tokenizer has no tokenizer.json, and none can be made of its files")
    options = _options(transformer)
    if not all(isinstance(each, dict) for each in options.values()):
        raise UnsupportedModel("processing_kwargs of the checkpoint is not an object of objects")
    unknown = {each for name in ("text", "common") for each in set(options.get(name, {})) - _OF_THE_CALL}
    unknown |= set(options) - {"text", "common", "chat_template"}
    unknown |= _NOT_OF_THE_TEMPLATE & set(options.get("chat_template", {}))
    if unknown:
        raise UnsupportedModel(f"processing_kwargs of the checkpoint has {', '.join(sorted(unknown))}: not known")
    rope: dict[str, Any] = getattr(transformer.config, "rope_parameters", None) or {}
    kinds = {each.get("rope_type") for each in (rope, *rope.values()) if isinstance(each, dict)}
    if kinds & {"dynamic", "longrope"}:
        raise UnsupportedModel(
            f"rope_type {', '.join(map(str, kinds))}: a pair's score would change with the longest of its batch"
        )


def _options(transformer: Transformer) -> dict[str, Any]:
    return cast("dict[str, Any]", transformer.processing_kwargs)


def _keep_rows(model: Any, token_ids: Sequence[int]) -> None:
    """Of the output layer, those of `token_ids`, in float32. What the model does to its logits, it does to theirs."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UnsupportedModel(f"{type(model).__name__} has no linear output layer")
    if max(token_ids) >= head.out_features:
        raise ModelError(
            f"LogitScore looks at the token {max(token_ids)}, and the model's vocabulary has {head.out_features}"
        )
    rows = nn.Linear(head.in_features, len(token_ids), bias=head.bias is not None, dtype=torch.float32)
    rows.weight = nn.Parameter(head.weight.detach()[token_ids], requires_grad=False)
    if head.bias is not None:
        rows.bias = nn.Parameter(head.bias.detach()[token_ids], requires_grad=False)
    model.set_output_embeddings(rows)


def _tokenizer_of(transformer: Transformer) -> PairTokenizer | ChatPairTokenizer:
    """Through the chat template where sentence-transformers takes that way, else as the tokenizer joins two texts."""
    limits = [_options(transformer).get(name, {}).get("max_length") for name in ("text", "common")]
    max_tokens = min([max_tokens_of(transformer), *(each for each in limits if isinstance(each, int) and each > 0)])
    tokenizer: Any = transformer.tokenizer
    if "message" not in transformer.modality_config:
        return PairTokenizer(tokenizer.backend_tokenizer, max_tokens=max_tokens)
    render = _render_of(transformer)
    made = ChatPairTokenizer(tokenizer.backend_tokenizer, render, max_tokens=max_tokens)
    try:
        frame, other = _in_time(lambda: (made.frame("", "alpha"), render("", Pair("charlie", "0"))))
    except (*BROKEN, jinja2.TemplateError, MemoryError) as error:
        said = " ".join(str(error).split())
        raise ModelError(f"the chat template fails on a query and a document: {said}") from error
    if frame is None:
        raise UnsupportedModel(
            "the chat template does not write the message of the role 'document' once, as it is: it was made for "
            "something else than to rerank"
        )
    if other == frame.head + "0" + frame.tail:
        raise UnsupportedModel("the chat template leaves out the message of the role 'query': it is not for reranking")
    return made


def _render_of(transformer: Transformer) -> Render:
    """Messages of the roles that sentence-transformers gives a pair, a prompt as the system's before them."""
    options = {**_options(transformer).get("chat_template", {})}
    options.pop("restore_suffix", None)  # what is behind the document is never cut
    flat = transformer.input_formatter.message_format == "flat"
    tokenizer: Any = transformer.tokenizer

    def render(prompt: str, pair: Pair) -> str:
        texts = [("system", prompt)] if prompt else []
        texts += [("query", pair.query), ("document", pair.document)]
        messages = [
            {"role": role, "content": text if flat else [{"type": "text", "text": text}]} for role, text in texts
        ]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))

    return render


def _in_time(work: Callable[[], _T]) -> _T:
    """What it gives, or `UnsupportedModel`: a template may go round in circles for ever."""
    thread_ids: list[int] = []

    def run() -> _T:
        thread_ids.append(threading.get_ident())
        return work()

    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(run).result(_TEMPLATE_SECONDS)
    except TimeoutError as error:
        for thread_id in thread_ids:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id), ctypes.py_object(TimeoutError))
        raise UnsupportedModel(f"the chat template did not come to an end in {_TEMPLATE_SECONDS:.0f} s") from error
    finally:
        pool.shutdown(wait=False)
