"""Every implementation that is timed, behind one form: `prepare(workload, mode, threads)` gives a call or None.

A call takes nothing and returns the output and, in training, the gradients (of x and all weights; of a whole model the
loss and the gradients of its parameters). None: the provider has nothing of its own for this workload and mode.
"""

import importlib.metadata
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_graph
import torch
from registry import LanguageModel, OneStep, Product, Resets, Varlen, Workload
from torch import Tensor, nn

import fastlm
from fastlm.ops.gemm import gemm

Call = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Provider:
    """One implementation; `pool` names the thread pool that it runs on, `package` what must be installed.

    One that is not `comparable` computes something else on purpose: a yardstick, neither checked nor a peer.
    """

    name: str
    package: str
    pool: str
    prepare: Callable[[Workload, str, int], Call | None]
    comparable: bool = True

    def version(self) -> str | None:
        """The installed version, None where the package is missing."""
        if self.package == "fastlm":
            return fastlm.__version__  # a checkout on the path counts
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _module_call(
    workload: Any, module: nn.Module, mode: str, dtype: torch.dtype | None = None, fused: bool = False
) -> Call:
    """The workload through a torch module, in its dtype or another; grad mode is the caller's to set."""
    dtype = dtype or workload.dtype
    module = module.to(dtype)
    inputs = tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in workload.inputs())
    if mode == "forward":
        module.eval()
        copies = itertools.cycle([inputs, *_copies(workload, inputs)])
        return lambda: [_first(module(*next(copies)))]
    parameters = list(module.parameters())
    if isinstance(workload, LanguageModel):
        optimizer = torch.optim.Adam(parameters, fused=fused)

        def step() -> list[Tensor]:
            optimizer.zero_grad()
            loss = module.loss(*inputs, workload.targets)
            loss.backward()
            optimizer.step()
            return [loss.detach(), *(parameter.grad for parameter in parameters)]

        return step
    leaves = [*(tensor.requires_grad_() for tensor in inputs), *parameters]
    with torch.no_grad():
        grad_output = workload.grad_output(_first(module(*inputs)))

    def forward_backward() -> list[Tensor]:
        output = _first(module(*inputs))
        return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]

    return forward_backward


def _copies(workload: Any, inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """More inputs of equal values, for a workload that is to find them in memory, not in a cache."""
    return [tuple(tensor.clone() for tensor in inputs) for _ in range(getattr(workload, "copies", 1) - 1)]


def _other(method: str, forward_only: bool = False) -> Callable[[Workload, str, int], Call | None]:
    """A provider that runs another module of a workload, where that has one."""

    def prepare(workload: Workload, mode: str, threads: int) -> Call | None:
        if forward_only and mode != "forward":
            return None
        make = getattr(workload, method, None)
        module = make() if make else None
        return None if module is None else _module_call(workload, module, mode)

    return prepare


def reference(workload: Workload, mode: str) -> list[Tensor]:
    """The truth: torch in float64."""
    if isinstance(workload, Product):
        a, b = _operands(workload)
        return [a.double() @ b.double()]
    return list(_module_call(workload, workload.module(), mode, torch.float64)())


def _operands(workload: Product) -> list[Tensor]:
    return [
        tensor.mT if transposed else tensor
        for tensor, transposed in zip(workload.inputs(), workload.transposed, strict=True)
    ]


def _torch(workload: Workload, mode: str, threads: int) -> Call:
    if isinstance(workload, Product):
        a, b = _operands(workload)
        return lambda: [torch.matmul(a, b)]
    if isinstance(workload, OneStep):
        return _carried(workload, workload.module())
    return _module_call(workload, workload.module(), mode)


def _carried(workload: OneStep, module: nn.Module) -> Call:
    """One step after the other through a layer's forward."""
    module, x = module.to(workload.dtype).eval(), workload.inputs()[0].to(workload.dtype)
    state: Any = None

    def step() -> list[Tensor]:
        nonlocal state
        output, state = module(x, state)
        return [output]

    return step


def _torch_padded(workload: Workload, mode: str, threads: int) -> Call | None:
    """Runs past the end of every sequence and ignores what comes out, often faster than packing."""
    return _module_call(workload, workload.recurrent(), mode) if isinstance(workload, Varlen) else None


def _torch_tuned(workload: Workload, mode: str, threads: int) -> Call | None:
    if isinstance(workload, LanguageModel) and mode == "training":
        return _module_call(workload, workload.module(), mode, fused=True)
    return None


def _fastlm(workload: Workload, mode: str, threads: int) -> Call:
    if isinstance(workload, Product):
        arguments = (*workload.inputs(), *workload.transposed)
        return lambda: [gemm(*arguments)]
    if isinstance(workload, OneStep):
        stream = fastlm.nn.Stream(workload.module().to(workload.dtype), workload.batch)
        x = workload.inputs()[0][0].to(workload.dtype)
        out = torch.empty(workload.batch, workload.hidden, dtype=workload.dtype)
        return lambda: [stream.step(x, out)[None]]
    return _module_call(workload, workload.fast_module(), mode)


def _without_resets(workload: Workload, mode: str, threads: int) -> Call | None:
    """The same layer of fastlm without its mask: what a mask costs."""
    return _module_call(workload, fastlm.replace(workload.recurrent()), mode) if isinstance(workload, Resets) else None


def _fastlm_tuned(workload: Workload, mode: str, threads: int) -> Call | None:
    if isinstance(workload, LanguageModel) and mode == "training":
        return _module_call(workload, workload.fast_module(), mode, fused=True)
    return None


def _onnxruntime(workload: Workload, mode: str, threads: int) -> Call | None:
    if mode != "forward" or not onnx_graph.covers(workload):
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        onnx_graph.build(workload).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()  # session.run would look names up and check shapes in every call
    x = workload.inputs()[0]
    binding.bind_cpu_input("x", x.numpy())
    binding.bind_output("y")

    def call(keep: Tensor = x) -> list[Tensor]:  # the binding holds no reference
        session.run_with_iobinding(binding)
        return [torch.from_numpy(binding.get_outputs()[0].numpy())]

    return call


def _openvino(workload: Workload, mode: str, threads: int) -> Call | None:
    if mode != "forward" or not onnx_graph.covers(workload):
        return None
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    model = core.read_model(onnx_graph.build(workload).SerializeToString())
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    x = workload.inputs()[0]
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))

    def call(keep: Tensor = x) -> list[Tensor]:  # the request holds no reference
        request.infer()
        return [torch.from_numpy(request.get_output_tensor().data)]

    return call


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("torch", "torch", "torch", _torch),
        Provider("torch_padded", "torch", "torch", _torch_padded),
        Provider("torch_tuned", "torch", "torch", _torch_tuned),
        Provider("torch_naive", "torch", "torch", _other("naive_module")),
        Provider("torch_loop", "torch", "torch", _other("loop_module")),
        Provider("torch_composed", "torch", "torch", _other("composed_module")),
        Provider("torch_flex", "torch", "torch", _other("flex_module", forward_only=True)),
        Provider("fastlm", "fastlm", "torch", _fastlm),
        Provider("fastlm_lengths", "fastlm", "torch", _other("lengths_module")),
        Provider("fastlm_tuned", "fastlm", "torch", _fastlm_tuned),
        Provider("without_resets", "fastlm", "torch", _without_resets, comparable=False),
        Provider("onnxruntime", "onnxruntime", "onnxruntime", _onnxruntime),
        Provider("openvino", "openvino", "openvino", _openvino),
    )
}
