"""bfloat16 or float16 matrix products inside a float32 model.

Everything in bfloat16 keeps a cosine of only 0.998 to float32; products alone keep 0.9999. The weights are cast once,
where autocast would cast them on every call.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D


class MixedLinear(nn.Module):
    """A linear layer with weights of a smaller dtype between float32 activations.

    `narrow`: what comes out is left in the smaller dtype, for a product that follows soon.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, narrow: bool = False) -> None:
        super().__init__()
        self.narrow = narrow
        self.weight = nn.Parameter(weight.detach().to(dtype).contiguous(), requires_grad=False)  # [out, in]
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        product = functional.linear(x.to(self.weight.dtype), self.weight, self.bias)
        return product if self.narrow else product.float()


class MixedPatches(nn.Module):
    """The convolution that turns an image's patches into tokens, which is one product a patch."""

    def __init__(self, convolution: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows, self.columns = convolution.kernel_size
        bias = None if convolution.bias is None else convolution.bias.detach().to(dtype)
        self.weight = nn.Parameter(convolution.weight.detach().flatten(1).to(dtype), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @staticmethod
    def covers(convolution: nn.Conv2d) -> bool:
        """Whether its patches lie side by side, and are of an image."""
        plain = convolution.padding == (0, 0) and convolution.dilation == (1, 1)
        return plain and convolution.in_channels == 3 and convolution.kernel_size == convolution.stride

    def forward(self, pixels: Tensor) -> Tensor:
        """[batch, 3, height, width] -> [batch, dim, rows, columns]"""
        batch, colours, height, width = pixels.shape
        down, across = height // self.rows, width // self.columns
        pixels = pixels[:, :, : down * self.rows, : across * self.columns].to(self.weight.dtype)
        patches = pixels.reshape(batch, colours, down, self.rows, across, self.columns).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(batch, down * across, -1)
        tokens = functional.linear(patches, self.weight, self.bias).float()  # [batch, patches, dim]
        return tokens.transpose(1, 2).reshape(batch, -1, down, across)


class MixedAttention(nn.Module):
    """`nn.MultiheadAttention` of batches first, with all of its products in the smaller dtype."""

    def __init__(self, attention: nn.MultiheadAttention, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = attention.num_heads
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        self.inner = MixedLinear(weight, bias, dtype, narrow=True)  # of query, key and value
        self.outer = MixedLinear(attention.out_proj.weight, attention.out_proj.bias, dtype)

    @staticmethod
    def covers(attention: nn.MultiheadAttention) -> bool:
        """Whether the forward pass below is this one's, with nothing left out."""
        of_one_width = attention.in_proj_weight is not None and attention.in_proj_bias is not None
        return attention.batch_first and of_one_width and attention.bias_k is None and not attention.add_zero_attn

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = True, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """[batch, tokens, dim] each. A mask is added to the scores. The weights are never given."""
        dtype, (batch, tokens, width) = self.inner.weight.dtype, query.shape
        if query is key and key is value:
            projected = self.inner(query).chunk(3, dim=-1)
        else:
            weights, biases = self.inner.weight.chunk(3), cast("Tensor", self.inner.bias).chunk(3)
            inputs = zip((query, key, value), weights, biases, strict=True)
            projected = tuple(functional.linear(each.to(dtype), weight, bias) for each, weight, bias in inputs)
        queries, keys, values = (
            each.view(batch, -1, self.heads, width // self.heads).transpose(1, 2) for each in projected
        )
        if attn_mask is not None:
            attn_mask = attn_mask.to(dtype)
            if attn_mask.ndim == 3:  # of each head of each item
                attn_mask = attn_mask.view(batch, self.heads, tokens, -1)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=attn_mask)
        return self.outer(mixed.transpose(1, 2).reshape(batch, tokens, width)), None


def use_mixed_products(model: nn.Module, dtype: torch.dtype, *, keep: tuple[type[nn.Module], ...] = ()) -> None:
    """Replace layers below `model` in place: every plain `nn.Linear`, GPT-2's `Conv1D` (the same, transposed),
    `nn.MultiheadAttention`, and the convolution over an image's patches.

    Other convolutions stay as they are: on a CPU they were no faster. So does what is of the types to `keep`, which
    take their layers' weights without calling them.
    """
    for name, child in list(model.named_children()):
        if isinstance(child, keep):
            continue
        if type(child) is nn.Linear:
            setattr(model, name, MixedLinear(child.weight, child.bias, dtype, narrow=_feeds_product(model, name)))
        elif type(child) is Conv1D:
            setattr(model, name, MixedLinear(child.weight.T, child.bias, dtype))
        elif type(child) is nn.MultiheadAttention and MixedAttention.covers(child):
            setattr(model, name, MixedAttention(child, dtype))
        elif type(child) is nn.Conv2d and MixedPatches.covers(child):
            setattr(model, name, MixedPatches(child, dtype))
        else:
            use_mixed_products(child, dtype, keep=keep)


def _feeds_product(model: nn.Module, name: str) -> bool:
    """Whether between this layer and the next one there is an activation, and nothing else."""
    if not isinstance(model, nn.Sequential):
        return False
    behind = list(model.named_children())
    behind = behind[[each for each, _ in behind].index(name) + 1 :]
    kinds = [type(module) for _, module in behind if not isinstance(module, nn.Identity)]
    return len(kinds) > 1 and kinds[1] is nn.Linear and kinds[0].__name__ in ("GELU", "QuickGELU")
