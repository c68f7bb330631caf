"""Initial weights that recurrent layers are known to train better from; torch.nn's own are the default."""

import torch

_GATES = {"LSTM": 4, "LSTMCell": 4, "GRU": 3, "GRUCell": 3}


def forget_bias_(module: torch.nn.Module, value: float = 1.0) -> torch.nn.Module:
    """Sets the forget gates' biases of an LSTM or LSTMCell so that they sum up to value; in place, returns the module.

    Jozefowicz et al. 2015, "An Empirical Exploration of Recurrent Network Architectures": 1 keeps gradients alive.

    Raises:
        TypeError: the module is no LSTM or LSTMCell, of torch.nn or fastlm.nn.
        ValueError: it has no biases.
    """
    _gates("forget_bias_", module, ("LSTM", "LSTMCell"))
    biases = [(name, bias) for name, bias in module.named_parameters(recurse=False) if name.startswith("bias_")]
    if not biases:
        raise ValueError("forget_bias_: expected a module with biases, got bias=False")
    with torch.no_grad():
        for name, bias in biases:
            bias.chunk(4)[1].fill_(value if name.startswith("bias_ih") else 0.0)
    return module


def orthogonal_(module: torch.nn.Module, gain: float = 1.0) -> torch.nn.Module:
    """Makes every gate's recurrent weights an orthogonal matrix times gain; in place, returns the module.

    Saxe et al. 2014, arXiv:1312.6120; with torch.nn.init.orthogonal_, which draws from torch's generator.

    Raises:
        TypeError: the module is no GRU, LSTM, GRUCell or LSTMCell, of torch.nn or fastlm.nn.
    """
    gates = _gates("orthogonal_", module, tuple(_GATES))
    for name, weight in module.named_parameters(recurse=False):
        if name.startswith("weight_hh"):
            for part in weight.detach().chunk(gates):
                torch.nn.init.orthogonal_(part, gain)
    return module


def _gates(function: str, module: object, kinds: tuple[str, ...]) -> int:
    kind = getattr(module, "mode", type(module).__name__)
    if not isinstance(module, torch.nn.RNNBase | torch.nn.RNNCellBase) or kind not in kinds:
        raise TypeError(f"fastlm.nn.init.{function}: expected {' or '.join(kinds)}, got {type(module).__name__}")
    return _GATES[kind]
