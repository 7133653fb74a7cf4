"""BGE-M3: of one forward pass a dense vector of a text, a sparse one, and one vector a token (arXiv:2402.03216).

With h the last hidden state of a token, they are, as FlagEmbedding computes them and calls its files:

- dense: what modules.json says, which is the first token's h, normalised
- multi_vector: C h + c of every token but the first, normalised; C and c are those of colbert_linear.pt
- sparse: of each token of the vocabulary the largest s . h + b that it has in the text, where that is above zero; s and
  b are those of sparse_linear.pt. `WITHOUT_WEIGHT` have none. It is never normalised
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn

from mlx_embeddings_backends.base import Item, LoadOptions, Output, Prepared, Row, Rows, SparseVector, Truncate, Vector
from mlx_embeddings_backends.errors import ModelError
from mlx_embeddings_backends.torch.devices import memory_bytes
from mlx_embeddings_backends.torch.sentence_transformer import Batch, SentenceTransformerBackend
from mlx_embeddings_backends.torch.tensor_files import check_tensors, read_tensors

OUTPUTS: Final[tuple[Output, ...]] = ("dense", "sparse", "multi_vector")
# transformers' names of the tokens that no sparse vector has. FlagEmbedding gives <mask> a weight like any other.
WITHOUT_WEIGHT: Final = ("cls_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True, slots=True)
class Text:
    """What waits in the queue for an item."""

    ids: NDArray[np.int64]  # [tokens]
    outputs: tuple[Output, ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """Tokens of some of a batch's items: those that one head runs on."""

    items: Sequence[int]  # by their place in the batch
    lengths: Sequence[int]  # [items], how many tokens of each
    places: Tensor  # [tokens], in the flattened [batch x longest]

    @classmethod
    def of(cls, tokens: Mapping[int, NDArray[np.int64]], longest: int) -> "Selection":
        """`tokens` has their places within each item."""
        places = [item * longest + own for item, own in tokens.items()]
        joined = np.concatenate(places) if places else np.zeros(0, dtype=np.int64)
        return cls(list(tokens), list(map(len, places)), torch.from_numpy(joined))


@dataclass(frozen=True, slots=True)
class M3Batch(Batch):
    texts: Sequence[Text]
    weighed: Selection
    projected: Selection


class BgeM3Backend(SentenceTransformerBackend):
    """Items that want different outputs share batches."""

    def __init__(self, folder: Path, options: LoadOptions) -> None:
        super().__init__(folder, options)
        self._projection = _read_head(folder / "colbert_linear.pt", self._hidden_size, self._hidden_size)
        self._weight = _read_head(folder / "sparse_linear.pt", self._hidden_size, 1)
        heads = (self._projection.to(self._device), self._weight.to(self._device))
        special = [getattr(self._vocabulary, f"{name}_id") for name in WITHOUT_WEIGHT]
        self._without_weight = [each for each in special if each is not None]
        self.info = replace(self.info, outputs=OUTPUTS, memory_bytes=self.info.memory_bytes + memory_bytes(*heads))

    def _assume_modules(self, assumed: list[nn.Module], options: LoadOptions) -> list[nn.Module]:
        """Those of BGE-M3: FlagEmbedding saves what it has trained without modules.json."""
        return [Pooling(self._hidden_size, "cls"), Normalize()]

    def prepare(self, items: Sequence[Item], truncate: Truncate = "none") -> list[Prepared]:
        if unknown := {output for item in items for output in item.outputs}.difference(OUTPUTS):
            raise ValueError(f"the model has no output {min(unknown)!r}")
        prepared = super().prepare(items, truncate)
        return [
            replace(each, payload=Text(each.payload, item.outputs)) for each, item in zip(prepared, items, strict=True)
        ]

    def collate(self, batch: Sequence[Prepared]) -> M3Batch:
        texts: list[Text] = [prepared.payload for prepared in batch]
        plain = super().collate([replace(each, payload=text.ids) for each, text in zip(batch, texts, strict=True)])
        tokens = plain.tokens
        longest = (tokens["attention_mask"] if isinstance(tokens, dict) else tokens.attention_mask).shape[1]
        weighed = {item: np.flatnonzero(self._has_weight(text.ids)) for item, text in _wanting("sparse", texts)}
        projected = {item: np.arange(1, len(text.ids)) for item, text in _wanting("multi_vector", texts)}
        return M3Batch(tokens, plain.group, texts, Selection.of(weighed, longest), Selection.of(projected, longest))

    def _has_weight(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        return ~np.isin(ids, self._without_weight)

    def _forward(self, batch: Batch) -> Rows:
        """The rows of `_pool`, as an array where no item asks for outputs by name."""
        assert isinstance(batch, M3Batch)
        features = self._encode(batch)
        hidden: Tensor = features["token_embeddings"]  # [batch, longest, dim]
        weights = _run_head(self._weight, hidden, batch.weighed)
        vectors = _run_head(self._projection, hidden, batch.projected)
        dense = self._pool(features, batch.group)
        if not any(text.outputs for text in batch.texts):
            return dense
        made: dict[Output, Mapping[int, Vector]] = {
            "dense": dict(enumerate(dense)),
            "sparse": {item: self._sparse_vector(batch.texts[item].ids, own[:, 0]) for item, own in weights.items()},
            "multi_vector": vectors,
        }
        return [_row(item, text.outputs, made) for item, text in enumerate(batch.texts)]

    def _sparse_vector(self, ids: NDArray[np.int64], weights: NDArray[np.float32]) -> SparseVector:
        """`weights` are those of the ids that have one."""
        indices, places = np.unique(ids[self._has_weight(ids)], return_inverse=True)
        values = np.zeros(len(indices), dtype=np.float32)
        with np.errstate(invalid="ignore"):  # a NaN is to show, and not to pass for a token without weight
            np.maximum.at(values, places, weights)
        kept = values != 0  # none is below
        return SparseVector(indices[kept].astype(np.int32), values[kept])

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """Empty for what only the model's table has a row of."""
        return [self._vocabulary.backend_tokenizer.id_to_token(each) or "" for each in ids]

    def warm_up(self) -> None:
        super().warm_up()
        self.run(self.collate(self.prepare([Item("warm " * 64, outputs=OUTPUTS)] * 8, truncate="end")))


def _wanting(output: Output, texts: Sequence[Text]) -> list[tuple[int, Text]]:
    return [(item, text) for item, text in enumerate(texts) if output in text.outputs]


def _run_head(head: nn.Linear, hidden: Tensor, selection: Selection) -> dict[int, NDArray[np.float32]]:
    """hidden [batch, longest, dim] -> [the item's selected tokens, what the head gives], by item."""
    if not selection.items:
        return {}
    selected = hidden.flatten(0, 1).index_select(0, selection.places.to(hidden.device, non_blocking=True))
    made: NDArray[np.float32] = head(selected).cpu().numpy()
    return dict(zip(selection.items, np.split(made, np.cumsum(selection.lengths)[:-1]), strict=True))


def _row(item: int, outputs: Sequence[Output], made: Mapping[Output, Mapping[int, Vector]]) -> Row:
    return {name: made[name][item] for name in outputs} if outputs else made["dense"][item]


def _read_head(file: Path, inputs: int, outputs: int) -> nn.Linear:
    """On the CPU, in float32. Raises `ModelError` where the file is missing, broken or another model's."""
    if not file.is_file():
        raise ModelError(f"the folder lacks {file.name}: a BGE-M3 has both colbert_linear.pt and sparse_linear.pt")
    with torch.device("meta"):
        head = nn.Linear(inputs, outputs)
    weights = read_tensors(file)
    named, expected = (
        {f"{file.stem}.{name}": each for name, each in found.items()} for found in (weights, head.state_dict())
    )
    check_tensors(named, expected, config="config.json")
    if not all(weight.is_floating_point() for weight in weights.values()):
        raise ModelError(f"{file.name} holds weights that are no floating point numbers")
    head.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
    return head.requires_grad_(False)
