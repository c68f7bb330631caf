"""Drop-in torch.nn.Dropout."""

import torch
from torch import Tensor

from fastlm import ops
from fastlm.nn._twin import TorchTwin


class Dropout(TorchTwin, torch.nn.Dropout):
    """torch.nn.Dropout by `fastlm.ops.dropout`.

    `fastlm.replace` leaves torch's where it is: it drops other values under the same seed.
    """

    torch_class = torch.nn.Dropout

    def forward(self, input: Tensor) -> Tensor:
        """input, of any shape, with some values 0 in training; itself in evaluation."""
        output = ops.dropout(input, self.p, self.training)
        return input.copy_(output) if self.inplace and output is not input else output
