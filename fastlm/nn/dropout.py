"""Drop-in torch.nn.Dropout."""

import torch
from torch import Tensor

from fastlm import ops


class Dropout(torch.nn.Dropout):
    """torch.nn.Dropout by `fastlm.ops.dropout`.

    `fastlm.replace` leaves torch's where it is: it drops other values under the same seed.
    """

    def forward(self, input: Tensor) -> Tensor:
        """input, of any shape, with some values 0 in training; itself in evaluation."""
        output = ops.dropout(input, self.p, self.training)
        return input.copy_(output) if self.inplace and output is not input else output
