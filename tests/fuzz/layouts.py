"""The same values otherwise in memory."""

import random

import torch
from torch import Tensor


def lay_out(tensor: Tensor, chance: random.Random) -> Tensor:
    """The same values in another memory layout, now and then; what lies between them is NaN, or True."""
    layout = chance.choice(("dense", "dense", "strided", "transposed", "offset"))
    if layout == "strided":
        return torch.stack((tensor, torch.full_like(tensor, float("nan"))), -1)[..., 0]
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.mT.contiguous().mT
    if layout == "offset":
        return torch.cat((tensor.new_full((1,), float("nan")), tensor.flatten()))[1:].view(tensor.shape)
    return tensor
