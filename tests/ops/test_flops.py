"""FlopCounterMode counts for an operation what it counts for torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fastlm


def _flops(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
@pytest.mark.parametrize("trained", ["inference", "weights", "everything"])
def test_layers_cost_what_torchs_gru_costs(kind, trained):  # its LSTM is oneDNN's, of which it counts nothing
    steps, batch, width, hidden = 5, 3, 7, 9
    x = torch.randn(steps, batch, width, requires_grad=trained == "everything")

    def flops(layer):
        def run():
            output = layer.requires_grad_(trained != "inference")(x)[0]
            if trained != "inference":
                output.sum().backward()

        return _flops(run)

    expected = flops(torch.nn.GRU(width, hidden))
    if trained != "inference":  # the gradient of the first state, which torch leaves out
        expected += 2 * batch * hidden * 3 * hidden
    gates = 3 if kind == "GRU" else 4
    assert flops(getattr(fastlm.nn, kind)(width, hidden)) == expected * gates // 3 > 0


@pytest.mark.parametrize("fake", [False, True])
def test_attention_counts_all_pairs(fake):
    batch, heads, kv_heads, queries, keys, width = 2, 4, 2, 6, 10, 8

    def run():
        q = torch.randn(batch, heads, queries, width, requires_grad=True)
        k, v = (torch.randn(batch, kv_heads, keys, width, requires_grad=True) for _ in range(2))
        fastlm.ops.attention(q, k, v, causal="lower_right").sum().backward()

    product = 2 * batch * heads * queries * keys * width
    if fake:
        with FakeTensorMode():
            assert _flops(run) == (2 + 5) * product
    else:
        assert _flops(run) == (2 + 5) * product


def test_attention_that_gives_its_weights_counts_the_same():
    attention = fastlm.nn.MultiheadAttention(8, 2)
    x = torch.randn(5, 3, 8)
    counts = [_flops(lambda need=need: attention(x, x, x, need_weights=need)[0].sum().backward()) for need in (0, 1)]
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(("starts", "pairs"), [([0, 2, 5], 2 * 2 + 3 * 3), ([0, 5, 5], 25)])
def test_packed_attention_counts_its_sequences(starts, pairs):
    q = torch.randn(5, 3, 8)
    assert _flops(lambda: fastlm.ops.attention_varlen(q, q, q, starts, starts)) == 2 * pairs * 3 * 2 * 8


@pytest.mark.parametrize(("reduction", "products"), [("mean", 3), ("sum", 3), ("none", 4)])
def test_output_layer(reduction, products):
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
    target = torch.randint(11, (6,))

    def run(loss):
        loss.sum().backward()

    product = _flops(lambda: F.linear(hidden, weight))
    ours = _flops(lambda: run(fastlm.ops.linear_cross_entropy(hidden, weight, target, reduction=reduction)))
    assert ours == products * product > 0


def test_product():
    a, b = torch.randn(5, 3), torch.randn(7, 5)
    assert _flops(lambda: torch.ops.fastlm.gemm(a, b, True, True)) == 2 * 3 * 5 * 7
