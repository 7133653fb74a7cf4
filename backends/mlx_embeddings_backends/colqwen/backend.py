"""ColQwen2.5 as a `Backend`, but for the forward pass, which each library has its own of."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mlx_embeddings_backends.base import Backend, DType, EncodedImage, Item, LoadOptions, ModelInfo, Prepared, Truncate
from mlx_embeddings_backends.colqwen.checkpoint import ColQwenConfig
from mlx_embeddings_backends.colqwen.processing import PROMPTS, ColQwenProcessor, Resize
from mlx_embeddings_backends.colqwen.resize import resize_bicubic


class ColQwenBackend(Backend):
    """Pages and queries to one vector a token, for late interaction.

    `folder` holds the checkpoint, or a LoRA adapter of the one in `options.base`.
    """

    def __init__(
        self, folder: Path, options: LoadOptions, config: ColQwenConfig, *, resize: Resize = resize_bicubic
    ) -> None:
        self._config = config
        self._processor = ColQwenProcessor(
            folder, options.base, config, max_image_tokens=options.max_image_tokens, resize=resize
        )

    def _describe(self, backend: str, device: str, dtype: DType, batch_tokens: int, memory_bytes: int) -> ModelInfo:
        return ModelInfo(
            backend=backend,
            device=device,
            dtype=dtype,
            dimensions=self._config.embedding_dim,
            max_tokens=self._config.text.max_position_embeddings,
            vocabulary_size=self._config.text.vocab_size,
            normalize=True,
            batch_tokens=batch_tokens,
            modalities=("text", "image"),
            outputs=("multi_vector",),
            prompts=PROMPTS,
            default_prompt="query",
            memory_bytes=memory_bytes,
        )

    def prepare(self, items: Sequence[Item], truncate: Truncate = "none") -> list[Prepared]:
        return self._processor.prepare(items, truncate)

    def warm_up(self) -> None:
        super().warm_up()
        page = io.BytesIO()
        Image.new("RGB", (140, 196), "white").save(page, "PNG")
        self.run(self.collate(self.prepare([Item(EncodedImage(page.getvalue()))])))
