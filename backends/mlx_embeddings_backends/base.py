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

# An array of each item. Dense: [dimensions], best left together as one array [batch, dimensions]; multi_vector:
# [vectors, dimensions], with as many vectors as the item has tokens.
Rows = NDArray[np.float32] | Sequence[NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load a checkpoint: what the user asked for, `auto` where the backend is to choose."""

    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    dtype: DType | Literal["auto"] = "auto"
    max_image_tokens: int | None = None  # fewer than the checkpoint's own limit: less detail, more speed
    base: Path | None = None  # where the checkpoint is a LoRA adapter: the folder of the model that it changes
    adapters: Mapping[str, Path] = field(default_factory=dict)  # AdapterHub's folders by name, the default first


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
    output: Output = "dense"
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None  # a key of `prompts`, put before every text unless another is asked for
    adapters: tuple[str, ...] = ()  # of which a request chooses one; the first is the default
    separator: str | None = None  # what a paper's title and abstract are joined with; None: it takes no papers


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image as a file's bytes, which `images.decode` reads, and a text that goes with it."""

    data: bytes
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One input: a text, the model's own token ids (taken as they are, special tokens included), or an image."""

    content: str | tuple[int, ...] | EncodedImage
    prompt: str = ""  # put before a text
    role: Role | None = None  # what a text is embedded as, where the model makes a difference beyond the prompt
    adapter: str | None = None  # one of `ModelInfo.adapters`; None: the default


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
        """One forward pass on the device: float32 vectors of each item, in the order given to `collate`.

        Raises `DeviceLost` when the device can compute no more.
        """

    def warm_up(self) -> None:
        """Do now what would make the first requests slow. Called once, on the worker's thread."""
        for count, words in ((1, 8), (8, 64)):
            self.run(self.collate(self.prepare([Item("warm " * words)] * count, truncate="end")))
