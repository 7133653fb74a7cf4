"""The contract between the server and a model: `Item` in, `Prepared` through the queue, float32 vectors out."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Output = Literal["dense", "multi_vector", "sparse", "rerank"]
Truncate = Literal["none", "end", "start"]
DType = Literal["float32", "bfloat16", "float16"]
Role = Literal["query", "document"]

# What `type` calls a model in the YAML file.
Kind = Literal["embeddings", "sparse-embeddings", "rerank"]


@dataclass(frozen=True, slots=True)
class SparseVector:
    """The places of a vector that are not zero, of as many as the vocabulary has tokens or an auto-encoder learnt."""

    indices: NDArray[np.int32]  # [non-zeros], ascending
    values: NDArray[np.float32]  # [non-zeros]


# Dense: [dimensions]. multi_vector: [vectors, dimensions], with as many vectors as the item has tokens. rerank: [1], a
# score before `ModelInfo.score_activation`.
Vector = NDArray[np.float32] | SparseVector
# Of one item; by name where the item asks for several.
Row = Vector | Mapping[Output, Vector]
# Of a batch. Arrays of one shape are best left together, [batch, dimensions].
Rows = NDArray[np.float32] | Sequence[Row]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load a checkpoint: what the user asked for, `auto` where the backend is to choose."""

    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    dtype: DType | Literal["auto"] = "auto"
    max_image_tokens: int | None = None  # fewer than the checkpoint's own limit: less detail, more speed
    base: Path | None = None  # where the checkpoint is a LoRA adapter: the folder of the model that it changes
    adapters: Mapping[str, Path] = field(default_factory=dict)  # AdapterHub's folders by name, the default first
    kind: Kind | None = None  # what the user calls the model, where its files leave that open


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the server may know of a loaded model."""

    backend: str
    device: str
    dtype: DType  # of the matrix products; rows are always float32
    dimensions: int  # of one vector
    max_tokens: int  # of one item, special tokens and prompt included
    vocabulary_size: int
    normalize: bool  # every vector ends in L2 normalisation; `run` leaves that last step to its caller
    batch_tokens: int  # the padded tokens a batch that this device runs fastest
    modalities: tuple[str, ...] = ("text",)
    outputs: tuple[Output, ...] = ("dense",)  # what one forward pass can give; the first is the model's own
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None  # a key of `prompts`, put before every text unless another is asked for
    adapters: tuple[str, ...] = ()  # of which a request chooses one; the first is the default
    separator: str | None = None  # what a paper's title and abstract are joined with; None: it takes no papers
    score_activation: Literal["sigmoid", "identity"] = "identity"  # of a reranker, from its scores to relevance
    memory_bytes: int = 0  # of its weights on the device; 0: not known

    @property
    def output(self) -> Output:
        return self.outputs[0]


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image as a file's bytes, which `images.decode` reads, and a text that goes with it."""

    data: bytes
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """What a reranker scores."""

    query: str
    document: str


@dataclass(frozen=True, slots=True)
class Item:
    """One input: a text, the model's own token ids (taken as they are, special tokens included), an image or a pair."""

    content: str | tuple[int, ...] | EncodedImage | Pair
    prompt: str = ""  # put before a text
    role: Role | None = None  # what a text is embedded as, where the model makes a difference beyond the prompt
    adapter: str | None = None  # one of `ModelInfo.adapters`; None: the default
    outputs: tuple[Output, ...] = ()  # those of `ModelInfo.outputs` that are wanted, by name; none: the first, bare
    max_active_dims: int | None = None  # of a sparse vector's largest values; None: as many as the checkpoint says


@dataclass(frozen=True, slots=True)
class PatchGrid:
    """Which of an item's vectors are patches of its image: `rows` x `columns`, row by row, from the `offset`-th on."""

    rows: int
    columns: int
    offset: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """An item made ready on the CPU, waiting for its batch."""

    payload: Any  # the backend's own
    tokens: int  # what the device will process for it, padding aside
    truncated: bool = False
    group: Hashable = None  # only items of one group may share a batch
    patches: PatchGrid | None = None  # of an image, in multi-vector output


class Backend(ABC):
    """A loaded model. Constructed and run on one thread; `prepare` and `collate` may be called from any."""

    info: ModelInfo

    @abstractmethod
    def prepare(self, items: Sequence[Item], truncate: Truncate = "none") -> list[Prepared]:
        """Tokenise texts and preprocess images, in order. Raises an `InputError`; then none of them is prepared."""

    @abstractmethod
    def collate(self, batch: Sequence[Prepared]) -> Any:
        """Join prepared items into what `run` takes: padded to the longest of them."""

    @abstractmethod
    def run(self, batch: Any) -> Rows:
        """One forward pass on the device: what each item is to give, in the order given to `collate`.

        Raises `DeviceLost` when the device can compute no more.
        """

    def token_strings(self, ids: Sequence[int]) -> list[str] | None:
        """The vocabulary's tokens that dimensions of a sparse vector stand for, as its tokenizer writes them.

        None, whatever the ids: they stand for none.
        """
        return None

    def warm_up(self) -> None:
        """Do now what would make the first requests slow. Called once, on the worker's thread."""
        for count, words in ((1, 8), (8, 64)):
            self.run(self.collate(self.prepare([Item("warm " * words)] * count, truncate="end")))
