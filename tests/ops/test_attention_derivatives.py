"""Derivatives of every order and kind, transforms, and registration: what stands on the ops of attention."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian

import fastlm
from fastlm.ops._attention_op import Options, Route
from tests.attention import Attention, make_attention, make_varlen, run_fastlm, run_torch
from tests.numerics import Outputs, Runner, check, check_all, forward_backward, kernels_only

FP64, BF16 = torch.float64, torch.bfloat16


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def equal(got: Outputs, expected: Outputs) -> bool:
    return all(torch.equal(got[name], value) and got[name].dtype == value.dtype for name, value in expected.items())


def as_function(run: Runner, case: Attention) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """(function of the case's tensors in order, these tensors)."""
    names = list(case.tensors())

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, tensors, strict=True))
        return tuple(run(case.map(lambda name, _: given[name])).values())

    return function, tuple(case.tensors().values())


def of_one(run: Runner, case: Attention, name: str) -> Callable[[Tensor], Tensor]:
    """All outputs, flat, as a function of one input."""

    def function(value: Tensor) -> Tensor:
        outputs = run(case.map(lambda key, tensor: value if key == name else tensor))
        return torch.cat([out.flatten() for out in outputs.values()])

    return function


# Small cases of every form; each query sees some key, for finite differences.
CASES = {
    "plain": {"k_len": 4},
    "shared keys": {"q_heads": 4, "kv_heads": 2, "causal": "upper_left"},
    "float mask": {"mask": "float", "mask_shape": (1, 3, 1), "k_len": 4},
    "bool mask": {"mask": "bool", "k_len": 4},
    "sinks": {"sinks": True, "kv_lengths": [4, 1], "k_len": 4},
    "softcap": {"softcap": 1.0, "slopes": "heads", "window": (1, 1)},
    "dropout": {"dropout_p": 0.3, "k_len": 4},
}
cases = pytest.mark.parametrize("options", CASES.values(), ids=CASES)


def small(options: dict, **more: object) -> Attention:
    case = make_attention(**{"batch": 2, "q_heads": 2, "q_len": 3, "dim": 2, "v_dim": 3, **options, **more})
    if options.get("mask") == "bool":
        case.mask[..., 0] = True
    return case


def packed(**options: object) -> Attention:
    return make_varlen([2, 0, 3], [3, 1, 3], 2, 2, kv_heads=1, past=1, **options)


@cases
def test_gradcheck(isa: str, options: dict) -> None:
    function, tensors = as_function(run_fastlm, small(options, dtype=FP64, requires_grad=True))
    assert torch.autograd.gradcheck(function, tensors)


@cases
def test_gradgradcheck(options: dict) -> None:
    """Without ISAs: a second derivative is composed."""
    function, tensors = as_function(run_fastlm, small(options, dtype=FP64, requires_grad=True))
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("options", [{}, {"causal": "lower_right", "sinks": True}], ids=str)
def test_gradcheck_packed(options: dict) -> None:
    case = packed(dtype=FP64, **options).map(lambda _, tensor: tensor.detach().nan_to_num(0.0).requires_grad_())
    function, tensors = as_function(run_fastlm, case)
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@cases
def test_gradcheck_in_forward_mode(options: dict) -> None:
    function, tensors = as_function(run_fastlm, small(options, dtype=FP64, requires_grad=True))
    batched = "dropout_p" not in options  # drawing a seed says no to vmap unless told how
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, check_batched_forward_grad=batched)


BY_INPUT = pytest.mark.parametrize("name", ["q", "k", "v", "mask", "sinks"])
ALL_INPUTS = {"mask": "float", "sinks": True, "causal": "upper_left"}


@BY_INPUT
def test_jacrev_jacfwd_and_jvp(name: str) -> None:
    case = small(ALL_INPUTS)
    double = case.to(FP64)
    value = case.tensors()[name]
    same, truth = (jacobian(of_one(run_torch, given, name), given.tensors()[name]) for given in (case, double))
    ours = of_one(run_fastlm, case, name)
    check(f"jacrev {name}", torch.func.jacrev(ours)(value), same, truth, "gradient")
    check(f"jacfwd {name}", torch.func.jacfwd(ours)(value), same, truth, "gradient")
    tangent = torch.randn_like(value)
    products = [torch.tensordot(jac, tangent.to(jac.dtype), dims=value.dim()) for jac in (same, truth)]
    check(f"jvp {name}", torch.func.jvp(ours, (value,), (tangent,))[1], *products, "gradient")
    with forward_ad.dual_level():
        dual = ours(forward_ad.make_dual(value, tangent))
        check(f"dual {name}", forward_ad.unpack_dual(dual).tangent, *products, "gradient")


@BY_INPUT
def test_func_grad_and_hessian(name: str) -> None:
    case = small(ALL_INPUTS, batch=1)
    value = case.tensors()[name]

    def loss(run: Runner, given: Attention) -> Callable[[Tensor], Tensor]:
        return lambda x: of_one(run, given, name)(x).square().sum()

    same, truth = (
        (jacobian(loss(run_torch, given), x), torch.autograd.functional.hessian(loss(run_torch, given), x))
        for given, x in ((case, value), (case.to(FP64), value.double()))
    )
    ours = loss(run_fastlm, case)
    check(f"grad {name}", torch.func.grad(ours)(value), same[0], truth[0], "gradient")
    check(f"hessian {name}", torch.func.hessian(ours)(value), same[1], truth[1], "gradient", 1.0)
    check(
        f"double backward {name}",
        torch.autograd.functional.hessian(ours, value),
        same[1],
        truth[1],
        "gradient",
        1.0,
    )


def test_vmap() -> None:
    """Over a leading dimension of all inputs, and gradients per sample."""
    many = [make_attention(2, 2, 3, 4, k_len=5, causal="lower_right", seed=seed) for seed in range(3)]
    q, k, v = (torch.stack([case.tensors()[name] for case in many]) for name in ("q", "k", "v"))

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return run_fastlm(Attention(q, k, v, causal="lower_right"))["output"]

    got = torch.func.vmap(forward)(q, k, v)
    per_sample = torch.func.vmap(torch.func.grad(lambda *qkv: forward(*qkv).square().sum()))(q, k, v)
    for i, case in enumerate(many):
        same, truth = run_torch(case)["output"], run_torch(case.to(FP64))["output"]
        check("vmap", got[i], same, truth)
        grads = [
            jacobian(lambda x, given=given: run_torch(replace(given, q=x))["output"].square().sum(), given.q)
            for given in (case, case.to(FP64))
        ]
        check("vmap(grad)", per_sample[i], *grads, "gradient", 1.0)


def test_gradient_penalty() -> None:
    """The norm of a gradient as a loss, some inputs without gradient."""

    def penalty(run: Runner, dtype: torch.dtype) -> Tensor:
        case = make_attention(2, 2, 4, 5, causal="upper_left").to(dtype)
        case = case.map(lambda name, tensor: tensor.requires_grad_(name in ("q", "v")))
        (grad,) = torch.autograd.grad(run(case)["output"].square().sum(), case.q, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), case.v)[0]

    check("penalty", penalty(run_fastlm, torch.float32), penalty(run_torch, torch.float32),
          penalty(run_torch, FP64), "gradient", 1.0)  # fmt: skip


def test_backward_twice_and_accumulation() -> None:
    case = make_attention(2, 2, 20, 8, mask="float", sinks=True, dropout_p=0.3, requires_grad=True)
    loss = sum(out.sum() for out in run_fastlm(case).values())
    loss.backward(retain_graph=True)
    first = {name: tensor.grad.clone() for name, tensor in case.tensors().items()}
    loss.backward()
    for name, tensor in case.tensors().items():
        assert torch.equal(tensor.grad, 2 * first[name]), name


def test_activation_checkpoint_replays_dropout() -> None:
    case = make_attention(2, 2, 20, 8, dropout_p=0.5)

    def run(given: Attention) -> Outputs:
        output = torch.utils.checkpoint.checkpoint(
            lambda q: fastlm.ops.attention(q, given.k, given.v, dropout_p=0.5), given.q, use_reentrant=False
        )
        return {"output": output}

    torch.manual_seed(3)
    got = forward_backward(run, case)
    torch.manual_seed(3)
    expected = forward_backward(lambda c: {"output": fastlm.ops.attention(c.q, c.k, c.v, dropout_p=0.5)}, case)
    assert equal(got, expected)


# Registration.

FORMS = {
    "dense": lambda: make_attention(2, 2, 3, 4, k_len=5),
    "bool mask": lambda: make_attention(2, 2, 3, 4, mask="bool", mask_shape=(3, 3), causal="upper_left"),
    "float mask": lambda: make_attention(2, 2, 3, 4, mask="float", mask_shape=(2, 1, 1, 3), softcap=2.0),
    "shared keys": lambda: make_attention(2, 4, 3, 4, kv_heads=2, k_len=5, kv_lengths=[5, 2], slopes="batch"),
    "dropout": lambda: make_attention(1, 2, 3, 4, dropout_p=0.5, window=(1, 1)),
    "heads inside": lambda: make_attention(2, 3, 5, 4).map(lambda _, t: t.transpose(1, 2).contiguous().transpose(1, 2)),
    "bfloat16": lambda: make_attention(2, 2, 3, 4, mask="float", dtype=BF16),
    "packed": lambda: make_varlen([2, 0, 3], [1, 2, 3], 4, 4, kv_heads=2),
    "packed, rows past": lambda: make_varlen([2, 3], [1, 3], 2, 4, past=2, slopes="batch", causal="lower_right"),
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def op_arguments(case: Attention, requires_grad: bool = False) -> tuple:
    """Arguments of the registered forward op, as the public function makes them."""
    case = case.map(lambda _, tensor: tensor.detach().nan_to_num(0.0).requires_grad_(requires_grad))
    made = []
    module = fastlm.ops.attention.__globals__  # the name is the function's

    def catch(*arguments: object) -> tuple[Tensor, Tensor]:
        made.append(arguments)
        return case.q.new_zeros(0), case.q.new_zeros(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module, "ATTENTION", Route(catch, catch, catch, catch))
        run_fastlm(replace(case, sinks=None))
    return made[0]


@kernels_only
@forms
def test_opcheck_forward(form: Callable[[], Attention]) -> None:
    torch.library.opcheck(torch.ops.fastlm.attention_forward.default, op_arguments(form(), requires_grad=True))


@kernels_only
@forms
def test_opcheck_backward(form: Callable[[], Attention]) -> None:
    case = form()
    arguments = op_arguments(case)
    output, lse = torch.ops.fastlm.attention_forward(*arguments)
    q, k, v, *options = arguments
    grad_lse = torch.randn_like(lse) if case.causal else None
    given = (torch.randn_like(output), grad_lse, q, k, v, output, lse, *options, Options(*options).bias is not None)
    torch.library.opcheck(torch.ops.fastlm.attention_backward.default, given)


# torch.compile, export, fake tensors, autocast.


COMPILED = {
    "dense": lambda n: make_attention(2, 2, n, 8, k_len=n + 6),
    "causal, shared keys": lambda n: make_attention(3, 4, n, 8, kv_heads=2, causal="upper_left"),
    "masks": lambda n: make_attention(2, 2, n, 8, mask="float", mask_shape=(n, n), sinks=True, softcap=2.0),
    "bool mask": lambda n: make_attention(2, 2, n, 8, mask="bool", mask_shape=(2, 1, 1, n), window=(4, 2)),
    "lengths": lambda n: make_attention(2, 2, n, 8, kv_lengths=[n, 2], causal="lower_right", slopes="heads"),
    "packed": lambda n: tensors_for_starts(make_varlen([n, 0, 3], [4, 2, n], 4, 8, kv_heads=2, past=2)),
    "packed with sinks": lambda n: tensors_for_starts(make_varlen([n, 3], [4, n], 2, 8, past=1, sinks=True)),
}


def tensors_for_starts(case: Attention) -> Attention:
    return replace(case, cu_seqlens_q=torch.tensor(case.cu_seqlens_q), cu_seqlens_k=torch.tensor(case.cu_seqlens_k))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, marks=() if name in ("dense", "masks", "packed with sinks") else pytest.mark.full, id=name)
        for name, make in COMPILED.items()
    ],
)
def test_compiled_for_all_lengths(make: Callable[[int], Attention]) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run_fastlm, fullgraph=True, dynamic=True, backend=counter)
    compilations = 0
    for length in (5, 9, 30):
        case = make(length)
        assert equal(forward_backward(compiled, case), forward_backward(run_fastlm, case))
        compilations = compilations or counter.frame_count
    assert counter.frame_count == compilations
    with torch.no_grad():
        assert equal(compiled(case), run_fastlm(case))


def test_compiled_with_dropout() -> None:
    """Seeded like eager code: the seed is drawn in the graph."""

    def run(case: Attention) -> Outputs:
        return {"output": fastlm.ops.attention(case.q, case.k, case.v, dropout_p=0.5)}

    case = make_attention(2, 2, 20, 8)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for function in (run, compiled):
        torch.manual_seed(3)
        results.append(forward_backward(function, case))
    assert equal(*results)
    assert not torch.equal(compiled(case)["output"], compiled(case)["output"])


@pytest.mark.full
def test_compiled_with_inductor() -> None:
    case = make_attention(2, 4, 6, 8, kv_heads=2, causal="upper_left", sinks=True)
    ours, theirs = (
        lambda given, run=run: {name: out.sin() for name, out in run(given).items()} for run in (run_fastlm, run_torch)
    )
    compiled = torch.compile(ours, fullgraph=True)
    runs = ((compiled, case), (theirs, case), (theirs, case.to(FP64)))
    check_all(*(forward_backward(run, given) for run, given in runs), scale=1.0)


def test_compiled_scaled_dot_product_attention() -> None:
    compiled = torch.compile(fastlm.ops.scaled_dot_product_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 3, 5, 8), (3, 5, 8)):
        q, k, v, mask = (*(torch.randn(shape) for _ in range(3)), torch.rand(5, 5) < 0.5)
        assert torch.equal(compiled(q, k, v, mask), fastlm.ops.scaled_dot_product_attention(q, k, v, mask))


class Block(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastlm.ops.attention(q, k, v, causal="lower_right")


def test_export() -> None:
    block, case = Block(), make_attention(2, 4, 5, 8, kv_heads=2, k_len=7)
    batch, queries, keys = (torch.export.Dim(name, min=2) for name in ("batch", "queries", "keys"))
    dims = ({0: batch, 2: queries}, {0: batch, 2: keys}, {0: batch, 2: keys})
    program = torch.export.export(block, (case.q, case.k, case.v), dynamic_shapes=dims)
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(torch.ops.fastlm.attention_forward.default) == 1
    for batch, queries, keys in ((2, 5, 7), (3, 40, 50), (2, 2, 600)):
        given = make_attention(batch, 4, queries, 8, kv_heads=2, k_len=keys)
        assert torch.equal(program.module()(given.q, given.k, given.v), block(given.q, given.k, given.v))


@forms
@pytest.mark.parametrize("where", ["fake", "meta"])
def test_shapes_without_data(form: Callable[[], Attention], where: str) -> None:
    case = replace(form(), dropout_p=0.0)
    expected = forward_backward(run_fastlm, case)
    if where == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            got = forward_backward(run_fastlm, case.map(lambda _, tensor: mode.from_tensor(tensor)))
    else:
        slopes = None if case.alibi_slopes is None else case.alibi_slopes.to("meta")
        mask = case.mask if case.mask is None else case.mask.to("meta")
        given = replace(case, alibi_slopes=slopes, mask=mask).map(lambda _, tensor: tensor.to("meta"))
        got = forward_backward(run_fastlm, given)
    for name, value in got.items():
        assert (value.shape, value.dtype, value.stride()) == (
            expected[name].shape, expected[name].dtype, expected[name].stride()
        ), name  # fmt: skip


@pytest.mark.parametrize(
    "options", [{"causal": "upper_left"}, {"mask": "float"}, {"sinks": True, "slopes": "heads"}], ids=str
)
def test_autocast(options: dict) -> None:
    """Results are bfloat16, gradients have the dtypes of the inputs."""
    case = make_attention(2, 4, 20, 16, kv_heads=2, **options)

    def under_autocast(given: Attention) -> Outputs:
        with torch.autocast("cpu", dtype=BF16):
            return run_fastlm(given)

    def in_bf16(given: Attention) -> Outputs:
        return run_torch(given.to(BF16))

    got = forward_backward(under_autocast, case)
    assert got["output"].dtype == BF16
    assert all(value.dtype == torch.float32 for name, value in got.items() if name != "output")
    check_all(got, forward_backward(in_bf16, case), forward_backward(run_torch, case.to(FP64)), 1.0)


def test_autocast_takes_mixed_dtypes_and_leaves_float64() -> None:
    case = make_attention(2, 2, 20, 16)
    mixed = replace(case, q=case.q.to(BF16))
    with torch.autocast("cpu", dtype=BF16):
        assert equal(run_fastlm(mixed), run_fastlm(case.to(BF16)))
        assert run_fastlm(case.to(FP64))["output"].dtype == FP64
    with torch.autocast("cpu", dtype=BF16), torch.no_grad():
        packed_case = make_varlen([5, 3], [5, 3])
        assert run_fastlm(packed_case)["output"].dtype == BF16


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_compiled_under_autocast(kind: str) -> None:
    case = make_attention(2, 2, 20, 16) if kind == "dense" else tensors_for_starts(make_varlen([5, 3], [5, 3]))
    compiled = torch.compile(run_fastlm, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=BF16):
        assert equal(compiled(case), run_fastlm(case))
