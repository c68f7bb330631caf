"""Bad input to attention is a clear Python error that names the argument, what was expected and what came."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import fastlm
from tests.attention import make_attention, make_varlen, run_fastlm
from tests.numerics import kernels_only

F = torch.zeros
Wrong = tuple[dict[str, Any], type[Exception], str]


def call(**wrong: Any) -> Any:
    """attention with B 2, Hq 4, Hkv 2, Tq 3, Tk 5, D 8, Dv 6, where the named arguments are replaced."""
    return fastlm.ops.attention(
        **{"q": F(2, 4, 3, 8), "k": F(2, 2, 5, 8), "v": F(2, 2, 5, 6), **wrong}  # type: ignore[arg-type]
    )


def call_varlen(**wrong: Any) -> Any:
    """attention_varlen with two sequences, 7 queries and 9 keys."""
    given = {"q": F(7, 4, 8), "k": F(9, 2, 8), "v": F(9, 2, 6), "cu_seqlens_q": [0, 3, 7], "cu_seqlens_k": [0, 5, 9]}
    return fastlm.ops.attention_varlen(**{**given, **wrong})


def call_torchs(**wrong: Any) -> Any:
    return fastlm.ops.scaled_dot_product_attention(
        **{"query": F(2, 4, 3, 8), "key": F(2, 4, 5, 8), "value": F(2, 4, 5, 6), **wrong}
    )


# Of both attention and attention_varlen.
OPTIONS: list[Wrong] = [
    ({"causal": "lower-right"}, ValueError, "causal"),
    ({"causal": True}, ValueError, "causal"),
    ({"window": (-2, 0)}, ValueError, "window"),
    ({"window": (0, -5)}, ValueError, "window"),
    ({"window": (1,)}, TypeError, "window"),
    ({"window": 3}, TypeError, "window"),
    ({"window": (1.5, 2)}, TypeError, "window"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p"),
    ({"dropout_p": "0.5"}, ValueError, "dropout_p"),
    ({"softcap": -1.0}, ValueError, "softcap"),
    ({"softcap": float("nan")}, ValueError, "softcap"),
    ({"softcap": float("inf")}, ValueError, "softcap"),
    ({"scale": 1e39}, ValueError, "scale"),
    ({"scale": float("nan")}, ValueError, "scale"),
    ({"scale": torch.ones((), requires_grad=True)}, ValueError, "scale"),
    ({"scale": "1"}, TypeError, "scale"),
    ({"alibi_slopes": F(3)}, ValueError, "alibi_slopes"),
    ({"alibi_slopes": F(4, 2)}, ValueError, "alibi_slopes"),
    ({"alibi_slopes": F(2, 4, 1)}, ValueError, "alibi_slopes"),
    ({"alibi_slopes": [1.0] * 4}, TypeError, "alibi_slopes"),
    ({"alibi_slopes": F(4).requires_grad_()}, ValueError, "alibi_slopes"),
    ({"return_lse": "both"}, TypeError, "return_lse"),
    ({"sinks": F(3)}, ValueError, "sinks"),
    ({"sinks": F(1, 4)}, ValueError, "sinks"),
    ({"sinks": [0.0] * 4}, TypeError, "sinks"),
    ({"sinks": 0.0}, TypeError, "sinks"),
    ({"sinks": F(4).long()}, ValueError, "sinks"),
    ({"sinks": F(4, device="meta")}, ValueError, "sinks"),
    ({"alibi_slopes": F(4, dtype=torch.complex64)}, ValueError, "alibi_slopes"),
    ({"scale": "one"}, TypeError, "scale"),
    ({"scale": F(2)}, TypeError, "scale"),
    ({"softcap": "one"}, TypeError, "softcap"),
    ({"softcap": 2**2000}, TypeError, "softcap"),
]

DENSE: list[Wrong] = [
    *OPTIONS,
    ({"k": F(2, 2, 5, 8).to_sparse()}, ValueError, "k"),
    ({"q": F(4, 3, 8)}, ValueError, "q"),
    ({"k": F(2, 5, 8)}, ValueError, "k"),
    ({"v": F(1, 2, 2, 5, 6)}, ValueError, "v"),
    ({"q": [[1.0]]}, TypeError, "q"),
    ({"k": None}, TypeError, "k"),
    ({"v": 1.0}, TypeError, "v"),
    ({"k": F(2, 2, 5, 8).double()}, ValueError, "k"),
    ({"v": F(2, 2, 5, 6).bfloat16()}, ValueError, "v"),
    ({"q": F(2, 4, 3, 8).long(), "k": F(2, 2, 5, 8).long(), "v": F(2, 2, 5, 6).long()}, ValueError, "q"),
    ({"k": F(2, 2, 5, 8, device="meta")}, ValueError, "k"),
    ({"k": F(2, 2, 5, 7)}, ValueError, "k"),
    ({"k": F(1, 2, 5, 8), "v": F(1, 2, 5, 6)}, ValueError, "k"),
    ({"k": F(2, 3, 5, 8), "v": F(2, 3, 5, 6)}, ValueError, "k"),
    ({"k": F(2, 8, 5, 8), "v": F(2, 8, 5, 6)}, ValueError, "k"),
    ({"k": F(2, 0, 5, 8), "v": F(2, 0, 5, 6)}, ValueError, "k"),
    ({"v": F(2, 2, 4, 6)}, ValueError, "v"),
    ({"v": F(2, 4, 5, 6)}, ValueError, "v"),
    ({"mask": F(3, 4)}, ValueError, "mask"),
    ({"mask": F(2, 3, 5)}, ValueError, "mask"),
    ({"mask": F(2, 2, 3, 5)}, ValueError, "mask"),
    ({"mask": F(1, 2, 4, 3, 5)}, ValueError, "mask"),
    ({"mask": F(0, 5)}, ValueError, "mask"),
    ({"mask": F(3, 5).long()}, ValueError, "mask"),
    ({"mask": F(3, 5).double()}, ValueError, "mask"),
    ({"mask": F(3, 5).half()}, ValueError, "mask"),
    ({"mask": [[True]]}, TypeError, "mask"),
    ({"mask": F(3, 5).to_sparse()}, ValueError, "mask"),
    ({"mask": F(3, 5, device="meta")}, ValueError, "mask"),
    ({"kv_lengths": [5, 6]}, ValueError, "kv_lengths"),
    ({"kv_lengths": [-1, 5]}, ValueError, "kv_lengths"),
    ({"kv_lengths": [5]}, ValueError, "kv_lengths"),
    ({"kv_lengths": torch.ones(2)}, ValueError, "kv_lengths"),
    ({"kv_lengths": [1.0, 2.0]}, TypeError, "kv_lengths"),
    ({"kv_lengths": torch.ones(2, dtype=torch.bool)}, ValueError, "kv_lengths"),
    ({"kv_lengths": torch.ones(1, 2, dtype=torch.int64)}, ValueError, "kv_lengths"),
    ({"kv_lengths": 5}, TypeError, "kv_lengths"),
    ({"kv_lengths": [5, 2**70]}, ValueError, "kv_lengths"),
]

PACKED: list[Wrong] = [
    *OPTIONS,
    ({"q": F(1, 4, 7, 8)}, ValueError, "q"),
    ({"k": F(9, 8)}, ValueError, "k"),
    ({"q": [[1.0]]}, TypeError, "q"),
    ({"k": F(9, 2, 8).double()}, ValueError, "k"),
    ({"k": F(9, 3, 8), "v": F(9, 3, 6)}, ValueError, "k"),
    ({"v": F(8, 2, 6)}, ValueError, "v"),
    ({"cu_seqlens_q": [1, 3, 7]}, ValueError, "cu_seqlens_q"),
    ({"cu_seqlens_q": [0, 5, 3]}, ValueError, "cu_seqlens_q"),
    ({"cu_seqlens_q": [0, 3, 8]}, ValueError, "cu_seqlens_q"),
    ({"cu_seqlens_q": [0, -1, 7]}, ValueError, "cu_seqlens_q"),
    ({"cu_seqlens_k": [0, 5, 10]}, ValueError, "cu_seqlens_k"),
    ({"cu_seqlens_k": [2, 5, 9]}, ValueError, "cu_seqlens_k"),
    ({"cu_seqlens_k": [0, 2**62, 9]}, ValueError, "cu_seqlens_k"),
    ({"cu_seqlens_k": [0, -(2**70), 9]}, ValueError, "cu_seqlens_k"),
    ({"cu_seqlens_k": [0, 9]}, ValueError, "cu_seqlens_k"),
    ({"cu_seqlens_q": []}, ValueError, "cu_seqlens_q"),
    ({"cu_seqlens_q": torch.zeros(1, 3, dtype=torch.int64)}, ValueError, "cu_seqlens_q"),
    ({"cu_seqlens_q": torch.tensor([0.0, 3, 7])}, ValueError, "cu_seqlens_q"),
    ({"cu_seqlens_q": [0.0, 3.0, 7.0]}, TypeError, "cu_seqlens_q"),
    ({"cu_seqlens_k": None}, TypeError, "cu_seqlens_k"),
    ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q"),
    ({"max_seqlen_k": 2.5}, ValueError, "max_seqlen_k"),
]

TORCHS: list[Wrong] = [
    ({"query": [1.0]}, TypeError, "query"),
    ({"key": None}, TypeError, "key"),
    ({"query": F(8)}, ValueError, "query"),
    ({"value": F(2, 4, 5, 6).double()}, ValueError, "value"),
    ({"key": F(2, 2, 5, 8), "value": F(2, 2, 5, 6)}, ValueError, "key"),
    ({"key": F(2, 3, 5, 8), "value": F(2, 3, 5, 6), "enable_gqa": True}, ValueError, "key"),
    ({"key": F(2, 2, 5, 8), "enable_gqa": True}, ValueError, "value"),
    ({"value": F(2, 2, 5, 6)}, ValueError, "value"),
    ({"key": F(2, 1, 5, 8), "value": F(2, 2, 5, 6)}, ValueError, "value"),
    ({"key": F(3, 4, 5, 8), "value": F(3, 4, 5, 6)}, ValueError, "query, key, value"),
    ({"key": F(2, 4, 5, 7)}, ValueError, "key"),
    ({"key": F(4, 5, 7)}, ValueError, "key"),
    ({"value": F(2, 4, 4, 6)}, ValueError, "value"),
    ({"value": F(4, 4, 6)}, ValueError, "value"),
    ({"query": F(2, 4, 3, 8).double()}, ValueError, "key"),
    ({"query": F(2, 4, 3, 8).long(), "key": F(2, 4, 5, 8).long(), "value": F(2, 4, 5, 6).long()}, ValueError, "query"),
    ({"scale": float("nan")}, ValueError, "scale"),
    ({"scale": float("inf")}, ValueError, "scale"),
    ({"scale": "one"}, TypeError, "scale"),
    ({"attn_mask": F(3, 4)}, ValueError, "attn_mask"),
    ({"attn_mask": F(3, 5).int()}, ValueError, "attn_mask"),
    ({"attn_mask": F(3, 5, device="meta")}, ValueError, "attn_mask"),
    ({"attn_mask": [[True]]}, TypeError, "attn_mask"),
    ({"attn_mask": F(1, 2, 4, 3, 5)}, ValueError, "attn_mask"),
    ({"dropout_p": 2.0}, ValueError, "dropout_p"),
]

CALLS = {"dense": (call, DENSE), "packed": (call_varlen, PACKED), "torchs": (call_torchs, TORCHS)}


@pytest.mark.parametrize(
    ("function", "wrong", "error", "name"),
    [
        pytest.param(function, *case, id=f"{kind}-{next(iter(case[0]))}-{index}")
        for kind, (function, wrongs) in CALLS.items()
        for index, case in enumerate(wrongs)
    ],
)
def test_wrong_argument(function: Any, wrong: dict[str, Any], error: type[Exception], name: str) -> None:
    function()  # the rest is right
    for requires_grad in (False, True):
        with torch.set_grad_enabled(requires_grad), pytest.raises(error, match=rf"^{name}: expected .*got"):
            function(**wrong)


KERNEL_CHECKS = {
    "kv_lengths": lambda: replace(make_attention(2, 2, 3, 8, k_len=5), kv_lengths=torch.tensor([6, 1])),
    "kv_lengths ": lambda: replace(make_attention(2, 2, 3, 8, k_len=5), kv_lengths=torch.tensor([1, -1])),
    "cu_seqlens_q": lambda: replace(packed_case(), cu_seqlens_q=torch.tensor([0, 6, 5])),
    "cu_seqlens_q ": lambda: replace(packed_case(), cu_seqlens_q=torch.tensor([1, 3, 5])),
    "cu_seqlens_k": lambda: replace(packed_case(), cu_seqlens_k=torch.tensor([0, 2, 100])),
}


def packed_case() -> Any:
    case = make_varlen([3, 2], [4, 1])
    return replace(case, cu_seqlens_q=torch.tensor(case.cu_seqlens_q), cu_seqlens_k=torch.tensor(case.cu_seqlens_k))


@pytest.mark.parametrize(("name", "make"), KERNEL_CHECKS.items(), ids=KERNEL_CHECKS)
def test_values_are_checked_when_compiled(name: str, make: Any) -> None:
    """Shapes are known to the compiler; values only to the kernel, at run time."""
    torch._dynamo.reset()
    compiled = torch.compile(run_fastlm, fullgraph=True, dynamic=True, backend="aot_eager")
    with pytest.raises((ValueError, RuntimeError), match=rf"{name.strip()}: expected .*got"):
        compiled(make())


@pytest.mark.parametrize("name", ["kv_lengths", "cu_seqlens_q", "cu_seqlens_k"])
def test_values_are_checked_by_the_reference(name: str) -> None:
    with fastlm.backend("reference"), pytest.raises(ValueError, match=rf"^{name}: expected .*got"):
        run_fastlm(KERNEL_CHECKS[name]())


def test_compiled_errors_are_the_same() -> None:
    torch._dynamo.reset()
    case = make_attention(2, 4, 3, 8, kv_heads=2)
    wrong = replace(case, k=case.k[..., :-1])
    for run in (run_fastlm, torch.compile(run_fastlm, backend="aot_eager")):
        with pytest.raises(ValueError, match="k: expected D = 8"):
            run(wrong)


@kernels_only
def test_op_called_directly_with_wrong_tensors() -> None:
    """Whoever goes round the public function gets an error too, never a read out of bounds."""
    case = make_attention(2, 4, 3, 8, kv_heads=2, k_len=5)
    right = {"q": case.q, "k": case.k, "v": case.v, "keep": torch.ones(1, 1, 3, 5, dtype=torch.bool),
             "bias": F(2, 1, 3, 5), "slopes": F(1, 4, 1, 1), "kv_lengths": torch.tensor([5, 2]), "q_starts": None,
             "k_starts": None, "seed": torch.tensor(3), "dropout": 0.5}  # fmt: skip

    def direct(**wrong: object) -> tuple[torch.Tensor, ...]:
        return torch.ops.fastlm.attention_forward(**{**right, **wrong})

    output, lse = direct()
    wrongs: list[dict[str, object]] = [
        {name: wrong}
        for name in ("q", "k", "v", "bias", "slopes")
        for tensor in [right[name]]
        for wrong in (tensor.double(), tensor[..., :-1].contiguous(), tensor[0])
        if wrong.numel() and not (name == "v" and wrong.shape[-1] == 7)  # values may have any width
    ]
    wrongs += [
        {"keep": F(1, 1, 3, 5)},
        {"keep": torch.ones(1, 1, 3, 4, dtype=torch.bool)},
        {"keep": torch.ones(3, 5, dtype=torch.bool)},
        {"kv_lengths": torch.tensor([5, 6])},
        {"kv_lengths": torch.tensor([5, 2, 3])},
        {"kv_lengths": torch.tensor([5, 2], dtype=torch.int32)},
        {"seed": torch.tensor([3])},
        {"seed": torch.tensor(3.0)},
        {"q_starts": torch.tensor([0, 2])},
        {"q_starts": torch.tensor([0, 2]), "k_starts": torch.tensor([0, 2])},
    ]
    for index, wrong in enumerate(wrongs):
        with pytest.raises((RuntimeError, ValueError)):
            pytest.fail(f"case {index}: {direct(**wrong)[0].shape} instead of an error")
    for bad in ({"output": output[..., :-1]}, {"lse": lse.double()}, {"lse": lse[:1]}, {"grad": output[:, :1]}):
        given = {"grad": output, "grad_lse": None, "q": case.q, "k": case.k, "v": case.v, "output": output, "lse": lse}
        options = {name: value for name, value in right.items() if name not in given} | {"need_bias": True}
        torch.ops.fastlm.attention_backward(*given.values(), **options)
        with pytest.raises((RuntimeError, ValueError)):
            torch.ops.fastlm.attention_backward(*{**given, **bad}.values(), **options)
