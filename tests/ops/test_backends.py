"""Which path a call takes: dtype, autocast, fallbacks, the forced back end, the forced ISA."""

import os
import shutil
import subprocess
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm
from fastlm import _native
from fastlm.models import RNNConfig, RNNForCausalLM
from tests.child import check_python, run_python
from tests.numerics import (
    Outputs,
    Recurrent,
    check_all,
    forward_backward,
    kernels_only,
    make_recurrent,
    run_fastlm,
    run_reference,
    run_torch,
)

KINDS = ("gru", "lstm")
BF16 = torch.bfloat16


class OpLog(TorchDispatchMode):
    """Collects the names of fastlm's operators as they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastlm":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def ops_called(function, *args) -> list[str]:
    with OpLog() as log:
        function(*args)
    return log.names


def equal(got: Outputs, expected: Outputs) -> bool:
    return all(torch.equal(got[name], value) and got[name].dtype == value.dtype for name, value in expected.items())


def in_bf16(case: Recurrent) -> Outputs:
    """torch with everything rounded to bfloat16, inside the graph."""
    return run_torch(case.to(BF16))


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_one_op_each_way(kind: str) -> None:
    case = make_recurrent(kind, 4, 3, 5, 6)
    assert ops_called(run_fastlm, case) == [f"{kind}_forward"]
    assert ops_called(forward_backward, run_fastlm, case) == [f"{kind}_forward", f"{kind}_backward"]


@pytest.mark.bfloat16
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 8, 16), (12, 5, 24, 40)], ids=("step", "sequence"))
def test_bfloat16(isa: str, kind: str, shape: tuple[int, ...]) -> None:
    case = make_recurrent(kind, *shape, dtype=BF16)
    assert ops_called(run_fastlm, case) == [f"{kind}_forward"]
    runs = ((run_fastlm, case), (run_torch, case), (run_torch, case.to(torch.float64)))
    check_all(*(forward_backward(run, given) for run, given in runs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 8, 16), (12, 5, 24, 40)], ids=("step", "sequence"))
def test_autocast_to_bfloat16(kind: str, shape: tuple[int, ...]) -> None:
    """Results are bfloat16, gradients have the dtypes of the inputs."""
    case = make_recurrent(kind, *shape)

    def under_autocast(given: Recurrent) -> Outputs:
        with torch.autocast("cpu", dtype=BF16):
            return run_fastlm(given)

    assert ops_called(under_autocast, case) == [f"{kind}_forward"]
    got = forward_backward(under_autocast, case)
    assert all(out.dtype == BF16 for out in under_autocast(case).values())
    assert all(value.dtype == torch.float32 for name, value in got.items() if name.startswith("grad_"))
    truth = forward_backward(run_torch, case.to(torch.float64))
    check_all(got, forward_backward(in_bf16, case), truth)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_takes_mixed_dtypes_and_leaves_float64(kind: str) -> None:
    case = make_recurrent(kind, 3, 2, 4, 5)
    double = case.to(torch.float64)
    with torch.autocast("cpu", dtype=BF16):
        mixed = run_fastlm(case.map(lambda name, tensor: tensor.to(BF16) if name in ("x", "h0") else tensor))
        assert all(out.dtype == BF16 for out in mixed.values())
        assert equal(run_fastlm(double), run_fastlm(double))
        inside = run_fastlm(double)
    assert equal(inside, run_fastlm(double))


@pytest.mark.parametrize("kind", KINDS)
def test_float16_runs_the_reference_and_says_so_once(kind: str) -> None:
    case = make_recurrent(kind, 3, 2, 4, 5, dtype=torch.float16)
    with pytest.warns(fastlm.FastlmFallbackWarning, match=f"{kind} has no kernel for torch.float16") as caught:
        got = run_fastlm(case)
    assert [warning.filename for warning in caught] == [run_fastlm.__code__.co_filename]
    assert equal(got, run_reference(case))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(run_fastlm(case), got)
        assert ops_called(run_fastlm, case) == []


def test_a_module_tells_its_fallback_where_it_was_called() -> None:
    module = fastlm.nn.LSTM(4, 6, proj_size=2)
    with pytest.warns(fastlm.FastlmFallbackWarning, match="projection") as caught:
        module(torch.randn(3, 2, 4))
    told = [warning.filename for warning in caught if warning.category is fastlm.FastlmFallbackWarning]
    assert told == [__file__]  # torch may tell of its own choice, once


@pytest.mark.parametrize("kind", KINDS)
def test_strict_turns_a_fallback_into_an_error(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLM_STRICT", "1")
    with pytest.raises(RuntimeError, match=rf"FASTLM_STRICT.*{kind} has no kernel for torch.float16"):
        run_fastlm(make_recurrent(kind, 3, 2, 4, 5, dtype=torch.float16))
    case = make_recurrent(kind, 3, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    run_fastlm(case)
    # Derivatives that are composed on purpose are no fallback.
    loss = run_fastlm(case)["output"].sum()
    (grad,) = torch.autograd.grad(loss, case.x, create_graph=True)
    torch.autograd.grad(grad.sum(), case.w_hh)
    assert ops_called(torch.func.grad(lambda x: fastlm_output(case, x).sum()), case.x.detach()) == []
    with fastlm.backend("reference"):
        run_fastlm(make_recurrent(kind, 3, 2, 4, 5, dtype=torch.float16))


def fastlm_output(case: Recurrent, x: Tensor) -> Tensor:
    return run_fastlm(case.map(lambda name, tensor: x if name == "x" else tensor.detach()))["output"]


def test_strict_with_a_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_recurrent("lstm", 3, 2, 4, 6)
    arguments = (case.x, (None, case.c0), case.w_ih, case.w_hh[:, :2], case.b_ih, case.b_hh, case.w_hh[:2])
    with pytest.warns(fastlm.FastlmFallbackWarning, match="projection"):
        assert fastlm.ops.lstm(*arguments)[0].shape == (3, 2, 2)
    monkeypatch.setenv("FASTLM_STRICT", "1")
    with pytest.raises(RuntimeError, match="projection"):
        fastlm.ops.lstm(*arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_forced_reference(kind: str) -> None:
    case = make_recurrent(kind, 4, 3, 5, 6)
    with fastlm.backend("reference"):
        assert ops_called(run_fastlm, case) == []
        assert equal(forward_backward(run_fastlm, case), forward_backward(run_reference, case))
    assert ops_called(run_fastlm, case) == [f"{kind}_forward"]


def test_forced_names() -> None:
    with pytest.raises(ValueError, match=r"expected one of reference, cpu, cuda, triton, got 'gpu'"):
        fastlm.backend("gpu").__enter__()
    for name in ("cuda", "triton"):
        with pytest.raises(RuntimeError, match=f"back end '{name}' is not available: "), fastlm.backend(name):
            pass
    with fastlm.backend("reference"):
        with pytest.raises(ZeroDivisionError), fastlm.backend("reference"):
            raise ZeroDivisionError
        assert ops_called(run_fastlm, make_recurrent("gru", 1, 1, 1, 1)) == []
    assert ops_called(run_fastlm, make_recurrent("gru", 1, 1, 1, 1)) == ["gru_forward"]


@kernels_only
def test_a_forced_kernel_is_no_reference() -> None:
    """What it has no kernel for is an error, also where nothing is strict."""
    with fastlm.backend("cpu"):
        run_fastlm(make_recurrent("gru", 3, 2, 4, 5))
        with pytest.raises(RuntimeError, match=r"back end 'cpu' is forced.*gru has no kernel for torch.float16"):
            run_fastlm(make_recurrent("gru", 3, 2, 4, 5, dtype=torch.float16))


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_forced_reference_of_what_is_no_operation(kind: str) -> None:
    layer, x = getattr(fastlm.nn, kind)(8, 16, num_layers=2), torch.randn(5, 3, 8)
    config = RNNConfig(vocab_size=300, hidden_size=16, embedding_size=8, cell=kind.lower())
    model = RNNForCausalLM(config).eval()
    with torch.no_grad():
        kernels = fastlm.nn.Stream(layer, 3).chunk(x)
        tokens = list(model.stream_tokens([1, 2], 20))
        with fastlm.backend("reference"):
            stream = fastlm.nn.Stream(layer, 3)
            assert fastlm.explain(stream.step, x[0])["backend"] == "reference"
            stream.reset()
            assert torch.allclose(stream.chunk(x), kernels, atol=1e-6)
            assert list(model.stream_tokens([1, 2], 20)) == tokens


def test_forced_by_environment() -> None:
    code = "from fastlm import _backend; print(_backend.forced())"
    assert check_python(code, FASTLM_BACKEND="reference") == "reference\n"
    assert check_python(code, FASTLM_BACKEND="") == "None\n"
    for name, text in (("gpu", "FASTLM_BACKEND: expected one of"), ("cuda", "'cuda' is not available")):
        done = run_python(code, FASTLM_BACKEND=name)
        assert done.returncode != 0
        assert text in done.stderr


def test_an_extension_that_does_not_load_is_told(tmp_path: Path) -> None:
    package = tmp_path / "fastlm"
    shutil.copytree(Path(fastlm.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = "import fastlm, torch; print(fastlm.__file__, fastlm.ops.gelu(torch.zeros(1)).item())"

    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code]  # finds the package in its working directory first
        return subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)

    unbuilt = run()
    assert unbuilt.stdout == f"{package / '__init__.py'} 0.0\n"
    assert "FastlmFallbackWarning" not in unbuilt.stderr
    (package / f"_C{EXTENSION_SUFFIXES[0]}").write_text("no library")
    broken, strict = run(), run(FASTLM_STRICT="1")
    told = "the extension fastlm._C is not available: "
    assert broken.stdout == unbuilt.stdout
    assert f"FastlmFallbackWarning: fastlm runs the plain reference: {told}" in broken.stderr
    assert strict.returncode != 0
    assert told in strict.stderr


@kernels_only
def test_isa_by_environment_and_by_call() -> None:
    module = _native.module
    usable = module.cpu_isas()
    assert "scalar" in usable
    assert module.cpu_isa() in usable
    code = "from fastlm import _native; print(_native.module.cpu_isa())"
    for name in usable:
        assert check_python(code, FASTLM_CPU_ISA=name) == f"{name}\n"
    done = run_python(code, FASTLM_CPU_ISA="sse9")
    assert done.returncode != 0
    assert "ValueError: FASTLM_CPU_ISA: expected one of scalar" in done.stderr
    assert run_python("import fastlm", FASTLM_CPU_ISA="sse9").returncode != 0
    with pytest.raises(ValueError, match="sse9"):
        module.set_cpu_isa("sse9")
    assert set(usable) <= set(module.build_info()["isas"])


def test_the_reference_runs_without_autocast() -> None:
    """What an autocast asks for is done before it: sums stay in float32."""
    q = torch.randn(2, 4, 64, 32)
    rounded = q.bfloat16()
    expected, lse = fastlm.ops.attention(rounded, rounded, rounded, return_lse=True)
    with torch.autocast("cpu", torch.bfloat16), fastlm.backend("reference"):
        output, got = fastlm.ops.attention(q, q, q, return_lse=True)
    assert (output.dtype, got.dtype) == (torch.bfloat16, torch.float32)
    assert (got - lse).abs().max() < 1e-4
    assert (output - expected).abs().max() <= 2**-6

    module, x = fastlm.nn.LSTM(32, 48, proj_size=16), torch.randn(9, 3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)[0]
    expected = module.bfloat16()(x.bfloat16())[0]
    assert torch.equal(output, expected)


@pytest.mark.parametrize(
    "call", ["lengths", "kv_lengths", "packed", "attention dropout", "dropout", "reference", "stream"]
)
def test_a_default_device_is_for_tensors_without_one(call: str) -> None:
    module, x, q = fastlm.nn.GRU(3, 4), torch.randn(5, 2, 3), torch.randn(1, 2, 3, 4)
    rows, stream = q[0].transpose(0, 1).contiguous(), fastlm.nn.Stream(module, 2)

    def run() -> Tensor:
        torch.manual_seed(1)
        if call == "lengths":
            return module(x, lengths=[3, 5])[0]
        if call == "kv_lengths":
            return fastlm.ops.attention(q, q, q, kv_lengths=[2])  # type: ignore[return-value]
        if call == "packed":
            return fastlm.ops.attention_varlen(rows, rows, rows, [0, 1, 3], [0, 1, 3])  # type: ignore[return-value]
        if call == "attention dropout":
            return fastlm.ops.attention(q, q, q, dropout_p=0.5)  # type: ignore[return-value]
        if call == "dropout":
            return fastlm.ops.dropout(q)
        if call == "reference":
            with fastlm.backend("reference"):
                return fastlm.ops.attention(q, q, q, causal="lower_right", dropout_p=0.5)  # type: ignore[return-value]
        stream.reset()
        stream.step(x[0])
        return stream.state

    with torch.no_grad():
        expected = run()
        with torch.device("meta"):  # any that is not the CPU
            assert torch.equal(run(), expected)
