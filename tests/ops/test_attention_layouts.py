"""Attention on tensors otherwise in memory, before, within and after it."""

import pytest
import torch
from torch import Tensor

import fastlm
from tests.attention import check_attention, equal, make_attention, run_fastlm, same_to_the_bit
from tests.numerics import forward_backward, kernels_only


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same values (B, H, T, D) in memory otherwise."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 5), torch.nan, dtype=tensor.dtype)
    wide[..., 2:-3] = tensor
    sparse = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype)
    sparse[..., ::2] = tensor
    return {
        "BTHD": tensor.transpose(1, 2).contiguous().transpose(1, 2),
        "TBHD": tensor.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
        "slice of rows": wide[..., 2:-3],
        "every second": sparse[..., ::2],
        "BHDT": tensor.mT.contiguous().mT,
        "every second step": tensor.repeat_interleave(2, 2)[:, :, ::2],
    }


@kernels_only
@pytest.mark.parametrize("q_len", [2, 40])
def test_layouts(isa: str, q_len: int) -> None:
    case = make_attention(2, 4, q_len, 17, kv_heads=2, k_len=70, causal="lower_right")
    made = {name: layouts(tensor) for name, tensor in case.tensors().items()}
    expected = forward_backward(run_fastlm, case)
    for layout in made["q"]:
        for names in (("q",), ("k", "v"), ("q", "k", "v")):
            other = case.map(lambda name, tensor, n=names, at=layout: made[name][at] if name in n else tensor)
            assert equal(forward_backward(run_fastlm, other), expected), (layout, names)


@kernels_only
def test_expanded_inputs(isa: str) -> None:
    """Stride 0 over batch, heads, steps or width."""
    for q_len in (2, 40):
        case = make_attention(2, 2, q_len, 8, k_len=70)
        for dim in range(4):
            expanded = case.map(lambda _, tensor, dim=dim: tensor.narrow(dim, 1, 1).expand_as(tensor))
            assert same_to_the_bit(expanded, expanded.map(lambda _, tensor: tensor.contiguous()))


@kernels_only
def test_arriving_gradients_in_any_layout(isa: str) -> None:
    case = make_attention(2, 2, 20, 8, requires_grad=True)
    output, lse = run_fastlm(case).values()
    leaves = (case.q, case.k, case.v)
    for grad in (torch.ones(()).expand_as(output), torch.randn_like(output)[..., :1].expand_as(output)):
        for form in (grad, *layouts(grad.contiguous()).values()):
            got = torch.autograd.grad((output, lse), leaves, (form, torch.ones(()).expand_as(lse)), retain_graph=True)
            dense = (grad.contiguous(), torch.ones_like(lse))
            expected = torch.autograd.grad((output, lse), leaves, dense, retain_graph=True)
            assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("arriving", [("output",), ("lse",)], ids=str)
def test_one_output_used(arriving: tuple[str, ...]) -> None:
    for q_len in (3, 40):
        case = make_attention(2, 4, q_len, 8, kv_heads=2, k_len=50, sinks=True, mask="float", mask_shape=(q_len, 50))
        check_attention(case, arriving=arriving)


@pytest.mark.parametrize("wanted", [("q",), ("k",), ("v",), ("mask",), ("sinks",), ("q", "v")], ids=str)
def test_gradient_of_some_inputs(isa: str, wanted: tuple[str, ...]) -> None:
    case = make_attention(2, 2, 20, 8, mask="float", sinks=True)
    got, expected = forward_backward(run_fastlm, case, wanted=wanted), forward_backward(run_fastlm, case)
    assert all(torch.equal(value, expected[name]) for name, value in got.items())


def test_strides_of_results(isa: str) -> None:
    """As the input they belong to: heads outside or inside."""
    for q_len in (2, 40):
        case = make_attention(2, 4, q_len, 8, kv_heads=2, k_len=50, v_dim=5, requires_grad=True)
        inside = case.map(lambda _, t: t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_())
        for given, order in ((case, (0, 1, 2, 3)), (inside, (0, 2, 1, 3))):
            output = fastlm.ops.attention(given.q, given.k, given.v)
            assert output.permute(order).is_contiguous()
            for grad in torch.autograd.grad(output.sum(), (given.q, given.k, given.v)):
                assert grad.permute(order).is_contiguous()


def test_results_share_no_memory(isa: str) -> None:
    for q_len, k_len in ((1, 1), (3, 50), (40, 40), (4, 0)):
        case = make_attention(1, 2, q_len, 8, k_len=k_len)
        got = forward_backward(run_fastlm, case)
        places = [t.untyped_storage().data_ptr() for t in (*got.values(), *case.tensors().values()) if t.numel()]
        assert len(set(places)) == len(places)


def test_inputs_stay_as_they_are(isa: str) -> None:
    case = make_attention(2, 2, 20, 8, mask="float", sinks=True, slopes="heads", kv_lengths=[7, 20], dropout_p=0.5)
    before = case.map(lambda _, tensor: tensor.clone())
    forward_backward(run_fastlm, case)
    for name, tensor in case.tensors().items():
        assert torch.equal(tensor.view(torch.int32), before.tensors()[name].view(torch.int32)), name
