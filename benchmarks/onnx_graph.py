"""The workloads as ONNX graphs, written node by node: an exporter would decide itself what a peer gets to run."""

from typing import Any

import numpy as np
import torch
from registry import CellLoop, Layer, Packed, Resets, TokenModel, Workload
from torch import Tensor, nn

# ONNX orders gates z, r, h (GRU) and i, o, f, c (LSTM); torch r, z, n and i, f, g, o.
GATE_ORDER = {"GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2)}


def covers(workload: Workload) -> bool:
    """True for float32 layers; a loop of graphs of one step would measure the runtime's call, not its layer."""
    if not isinstance(workload, Layer) or isinstance(workload, CellLoop | Resets):
        return False
    return workload.dtype == torch.float32


def build(workload: Layer) -> Any:
    """An onnx.ModelProto with input x and output y, weights of the workload's module."""
    import onnx

    graph = _Graph()
    module = workload.module()
    if isinstance(module, TokenModel):
        x_type = onnx.TensorProto.INT64
        hidden = graph.recurrent(module.rnn, graph.node("Gather", graph.tensor(module.embedding.weight), "x"))
        if module.last_only:
            hidden = graph.node("Gather", hidden, graph.tensor(np.array(-1)), axis=0)
        product = graph.node("MatMul", hidden, graph.tensor(module.linear.weight.mT))
        graph.node("Add", product, graph.tensor(module.linear.bias), output="y")
    else:
        x_type = onnx.TensorProto.FLOAT
        rnn, lengths = (module.rnn, module.lengths) if isinstance(module, Packed) else (module, None)
        graph.node("Identity", graph.recurrent(rnn, "x", lengths), output="y")
    x = onnx.helper.make_tensor_value_info("x", x_type, workload.inputs()[0].shape)
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    onnx_graph = onnx.helper.make_graph(graph.nodes, workload.name, [x], [y], graph.initializers)
    # The oldest version with these operators, so that any runtime reads it.
    return onnx.helper.make_model(onnx_graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8)


class _Graph:
    """Nodes and weights under generated names."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def tensor(self, value: Tensor | np.ndarray) -> str:
        from onnx import numpy_helper

        array = value.detach().numpy() if isinstance(value, Tensor) else value
        name = f"w{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def node(self, op: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        from onnx import helper

        name = output or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def recurrent(self, rnn: nn.RNNBase, x: str, lengths: Tensor | None = None) -> str:
        """All layers of rnn: (T, B, I) -> (T, B, H or 2H)."""
        directions = 2 if rnn.bidirectional else 1
        attributes: dict[str, Any] = {"hidden_size": rnn.hidden_size}
        if rnn.bidirectional:
            attributes["direction"] = "bidirectional"
        if rnn.mode == "GRU":
            attributes["linear_before_reset"] = 1
        sequence_lens = "" if lengths is None else self.tensor(lengths.numpy().astype(np.int32))
        for layer in range(rnn.num_layers):
            weights = [_layer_weights(rnn, layer, direction) for direction in range(directions)]
            w, r, b = (self.tensor(np.stack(tensors)) for tensors in zip(*weights, strict=True))
            y = self.node(rnn.mode, x, w, r, b, sequence_lens, **attributes)  # (T, directions, B, H)
            joined = self.node("Transpose", y, perm=(0, 2, 1, 3))
            x = self.node("Reshape", joined, self.tensor(np.array([0, 0, directions * rnn.hidden_size])))
        return x


def _layer_weights(rnn: nn.RNNBase, layer: int, direction: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """w_ih, w_hh and both biases as one, in ONNX's gate order."""
    suffix = f"l{layer}" + ("_reverse" if direction else "")

    def reordered(name: str) -> np.ndarray:
        gates = np.split(getattr(rnn, f"{name}_{suffix}").detach().numpy(), len(GATE_ORDER[rnn.mode]))
        return np.concatenate([gates[gate] for gate in GATE_ORDER[rnn.mode]])

    biases = np.concatenate((reordered("bias_ih"), reordered("bias_hh")))
    return reordered("weight_ih"), reordered("weight_hh"), biases
