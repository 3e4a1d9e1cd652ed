"""How a compiled decode step computes products of few rows: as sums that the compiler fuses with their surroundings.

The product of a matrix and a single row reads each weight once, so memory bandwidth limits it. oneDNN's bfloat16
products and the BLAS's float32 ones reach at most half the bandwidth of a fused sum. The same is true of the experts
that a row chose, which the sum reads in place instead of copying them first, and of attention with a single query,
where heads that share keys need no copies of them. The sums are in float32, as those products are.

Shapes: M rows, K and N sizes of a weight [N, K], P products of a batch, H heads, C columns of the cache, D head size.
"""

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """The product x W^T for a single row; more rows are left to the library."""
    if not _is_one(x.numel() // x.shape[-1]) or weight.dim() != 2:
        return NotImplemented
    out = (weight.float() * x.reshape(1, -1).float()).sum(-1)
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def bmm(left: Tensor, right: Tensor) -> Any:
    """[P, N, K] x [P, K, M] where one of N and M is 1."""
    if _is_one(right.shape[2]):
        return (left.float() * right.float().transpose(1, 2)).sum(-1, keepdim=True).to(left.dtype)
    if _is_one(left.shape[1]):
        return (left.float() * right.float().transpose(1, 2)).sum(-1).to(left.dtype)[:, None]
    return NotImplemented


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Any:
    """softmax(q K^T) V for one query [*, H, 1, D] over keys and values [*, H, C, D]; options `scale`, `enable_gqa`."""
    if not _is_one(query.shape[-2]) or dropout_p or is_causal or options.get("enable_gqa"):
        return NotImplemented
    scale = options.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query.float() * key.float()).sum(-1) * scale  # [*, H, C]
    if attn_mask is not None:
        mask = attn_mask.squeeze(-2)
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.float()
    weights = torch.softmax(scores, -1)
    return (weights[..., None] * value.float()).sum(-2, keepdim=True).to(query.dtype)


REWRITES: dict[Any, Any] = {
    aten.linear.default: linear,
    aten.bmm.default: bmm,
    aten.scaled_dot_product_attention.default: attention,
}


def _is_one(size: Any) -> bool:
    """Whether a size is 1 in every call, not only in the traced one."""
    return isinstance(size, int) and size == 1
