"""What open_clip's models and transformers' CLIP and SigLIP have in common on torch."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlx_embeddings_backends.base import Item
from mlx_embeddings_backends.dual_encoder import Batch, DualEncoder, blank_image
from mlx_embeddings_backends.errors import DeviceLost, InputError, ModelError, UnsupportedModel

# What a forward pass raises for towers that fit neither each other nor their inputs.
_MISFITS = (
    ArithmeticError, AssertionError, AttributeError, InputError, LookupError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


class TorchDualEncoder(DualEncoder):
    """Pixels go to the device as bytes, and are normalised there."""

    _device: torch.device
    _mean: Tensor  # of red, green and blue, of values up to 255
    _deviation: Tensor

    @abstractmethod
    def _embed_texts(self, ids: Tensor) -> Tensor:
        """[batch, tokens] -> [batch, dimensions]"""

    @abstractmethod
    def _embed_images(self, pixels: Tensor) -> Tensor:
        """Normalised, [batch, 3, height, width] -> [batch, dimensions]"""

    def _normalize_by(self, mean: Sequence[float], deviation: Sequence[float], levels: float = 255.0) -> None:
        """By what pixels have on the average once they are divided by `levels`. Raises `ValueError`."""
        if len(mean) != 3 or len(deviation) != 3 or not all(each > 0 for each in deviation):
            raise ValueError(f"mean {mean} and std {deviation} are not of three colours")
        # In double precision first: the device may have no other than single.
        self._mean = torch.tensor([each * levels for each in mean], dtype=torch.float32, device=self._device)
        self._deviation = torch.tensor([each * levels for each in deviation], dtype=torch.float32, device=self._device)

    @torch.inference_mode()
    def _forward(self, batch: Batch) -> NDArray[np.float32]:
        try:
            inputs = torch.from_numpy(batch.inputs).to(self._device, non_blocking=True)
            if batch.kind == "text":
                rows = self._embed_texts(inputs)
            else:
                rows = self._embed_images(((inputs.float() - self._mean) / self._deviation).permute(0, 3, 1, 2))
            return cast("NDArray[np.float32]", rows.float().cpu().numpy())
        except torch.AcceleratorError as error:
            # An error in a kernel leaves the CUDA context unusable; running out of memory is another exception.
            raise DeviceLost(str(error)) from error

    def _try_out(self) -> None:
        """A text of full length and an image, so that a config that fits nothing fails at once. Raises `ModelError`."""
        for kind, item in (("text", Item("a " * self.info.max_tokens)), ("image", Item(blank_image()))):
            try:
                rows = self.run(self.collate(self.prepare([item], "end")))
            except _MISFITS as error:
                raise ModelError(f"the checkpoint's files do not fit together, its {kind}s fail: {error}") from error
            if rows.shape != (1, self.info.dimensions):
                found = " x ".join(map(str, rows.shape[1:]))
                raise UnsupportedModel(
                    f"vectors are to have {self.info.dimensions} dimensions, and {kind}s have {found}"
                )
