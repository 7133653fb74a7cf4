"""bfloat16 or float16 matrix products inside a float32 model.

Everything in bfloat16 keeps a cosine of only 0.998 to float32; products alone keep 0.9999. The weights are cast once,
where autocast would cast them on every call.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D


class MixedLinear(nn.Module):
    """A linear layer with weights of a smaller dtype between float32 activations."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().to(dtype).contiguous(), requires_grad=False)  # [out, in]
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.to(self.weight.dtype), self.weight, self.bias).float()


def use_mixed_products(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every plain `nn.Linear` below `model`, and GPT-2's `Conv1D` (the same, transposed), in place."""
    for name, child in list(model.named_children()):
        if type(child) is nn.Linear:
            setattr(model, name, MixedLinear(child.weight, child.bias, dtype))
        elif type(child) is Conv1D:
            setattr(model, name, MixedLinear(child.weight.T, child.bias, dtype))
        else:
            use_mixed_products(child, dtype)
