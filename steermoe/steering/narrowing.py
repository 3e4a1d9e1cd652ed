"""Steered logits in the type that the router computes in, which may hold less than the float32 of the edit."""

import torch
from torch import Tensor


def narrowed(steered: Tensor, dtype: torch.dtype) -> Tensor:
    """Edited logits in the router's own type.

    float16 ends at 65,504, and what lies beyond would become infinite, then NaN in a softmax: the largest number takes
    its place. The other types reach as far as float32. Logits that are infinite already stay so.
    """
    if dtype == torch.float16:
        limit = torch.finfo(dtype).max
        steered = steered.clamp(-limit, limit).where(steered.isfinite(), steered)
    return steered.to(dtype)
