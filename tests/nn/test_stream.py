"""Step by step == in chunks == whole, with the state in every form in which it can be kept, set and cleared."""

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import fastlm
from fastlm.nn import Stream
from tests.numerics import check, kernels_only

KINDS = ("GRU", "LSTM")
kinds = pytest.mark.parametrize("kind", KINDS)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)

pytestmark = [
    pytest.mark.filterwarnings("ignore:fastlm runs the plain reference. Stream"),
]


def make(kind: str, *sizes: int, dtype: torch.dtype = torch.float32, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return getattr(torch.nn, kind)(*sizes, **options).to(dtype)


def states_of(module: torch.nn.Module, batch: int) -> Tensor | tuple[Tensor, Tensor]:
    made = [torch.randn(module.num_layers, batch, module.hidden_size).to(module.weight_hh_l0.dtype) for _ in range(2)]
    return made[0] if module.mode == "GRU" else tuple(made)


def flat(state: Tensor | tuple[Tensor, Tensor]) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else list(state)


def equal(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(flat(first), flat(second), strict=True))


# (T, B, I, H, L): one unit, odd sizes around vectors, more rows than a tile, sizes that two threads share.
SHAPES = [
    (3, 1, 1, 1, 1),
    (5, 3, 9, 17, 2),
    (4, 1, 33, 64, 3),
    (3, 5, 20, 31, 1),
    (3, 13, 16, 40, 2),
    (2, 2, 70, 200, 2),
]


@kernels_only
@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "fp64", "bf16"))
@pytest.mark.parametrize("bias", [True, False], ids=("bias", "no_bias"))
@torch.no_grad()
def test_whole_chunked_and_stepped_agree(isa: str, kind: str, dtype: torch.dtype, bias: bool) -> None:
    for seq_len, batch, input_size, hidden, layers in SHAPES:
        module = make(kind, input_size, hidden, layers, dtype=dtype, bias=bias)
        x, initial = torch.randn(seq_len, batch, input_size).to(dtype), states_of(module, batch)
        as_float64 = tuple(s.double() for s in flat(initial)) if kind == "LSTM" else initial.double()
        truth, truth_states = copy.deepcopy(module).double()(x.double(), as_float64)
        same, same_states = copy.deepcopy(module).float()(x.float(), initial.float() if kind == "GRU" else
                                                          tuple(s.float() for s in initial))  # fmt: skip
        if dtype == torch.bfloat16:
            same, same_states = module(x, initial)
        stream = Stream(module, batch)
        for way in ("step", "chunk", "mixed"):
            stream.state = initial
            if way == "step":
                got = torch.stack([stream.step(step) for step in x])
            elif way == "chunk":
                got = stream.chunk(x)
            else:
                got = torch.cat((stream.chunk(x[:1]), stream.step(x[1])[None], stream.chunk(x[2:])))
            results = [(got, same, truth)]
            results += zip(flat(stream.state), flat(same_states), flat(truth_states), strict=True)
            for value, baseline, exact in results:
                assert value.dtype in (dtype, torch.float32)
                if dtype == torch.float64:
                    baseline = exact + (baseline.double() - exact) * 2.0**-29
                check(way, value.to(dtype), baseline.to(dtype), exact)


@kinds
@torch.no_grad()
def test_bfloat16_weights_of_a_float32_module(isa: str, kind: str) -> None:
    for batch in (1, 6):
        module = make(kind, 9, 33, 2)
        rounded = copy.deepcopy(module)
        for name, parameter in rounded.named_parameters():
            if name.startswith("weight"):
                parameter.copy_(parameter.bfloat16())
        x = torch.randn(6, batch, 9)
        stream = Stream(module, batch, weight_dtype=torch.bfloat16)
        got = torch.stack([stream.step(step) for step in x])
        assert got.dtype == torch.float32
        check("output", got, rounded(x)[0], rounded.double()(x.double())[0])


@kinds
@kernels_only
@torch.no_grad()
def test_threads_give_the_same_bits(isa: str, kind: str) -> None:
    for batch, hidden, layers in ((1, 256, 2), (3, 100, 1), (40, 64, 2)):
        module = make(kind, 24, hidden, layers)
        x = torch.randn(20, batch, 24)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            stream = Stream(module, batch)
            results.append(
                (torch.stack([stream.step(step) for step in x[:4]]), stream.chunk(x[4:]), *flat(stream.state))
            )
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@kinds
@torch.no_grad()
def test_batch_first_and_empty_chunk(kind: str) -> None:
    module = make(kind, 4, 5, batch_first=True)
    stream, x = Stream(module, 3), torch.randn(3, 7, 4)
    assert stream.chunk(x[:, :0]).shape == (3, 0, 5)
    assert torch.allclose(stream.chunk(x), module(x)[0], atol=1e-6)
    assert stream.step(x[:, 0]).shape == (3, 5)


@kernels_only
@kinds
@torch.no_grad()
def test_out_is_filled_and_no_tensor_is_made(kind: str) -> None:
    stream, x = Stream(make(kind, 16, 32), 2), torch.randn(2, 16)
    twin, out = stream.clone(), torch.empty(2, 32)
    assert stream.step(x, out=out) is out
    assert torch.equal(twin.step(x), out)
    for given, tensors in ((out, 0), (None, 5)):
        with torch.profiler.profile(profile_memory=True) as profile:
            for _ in range(5):
                stream.step(x, given)
        assert sum(event.count for event in profile.key_averages() if event.key == "aten::empty") == tensors
    fresh = [stream.step(x) for _ in range(2)]
    assert fresh[0].data_ptr() != fresh[1].data_ptr()


@kinds
@torch.no_grad()
def test_inputs_of_any_layout(kind: str) -> None:
    stream = Stream(make(kind, 4, 5), 3)
    x = torch.randn(4, 3)
    assert torch.equal(stream.clone().step(x.mT), stream.clone().step(x.mT.contiguous()))
    wide = torch.randn(6, 3, 8)
    assert torch.equal(stream.clone().chunk(wide[..., ::2]), stream.clone().chunk(wide[..., ::2].contiguous()))


@kinds
@torch.no_grad()
def test_reset_of_rows(kind: str) -> None:
    module = make(kind, 4, 5, 2)
    stream = Stream(module, 4)
    stream.chunk(torch.randn(3, 4, 4))
    before = stream.state
    for rows, cleared in ((1, [1]), ([0, 2], [0, 2]), (torch.tensor([True, False, False, True]), [0, 3]),
                          (torch.tensor([2]), [2]), (None, [0, 1, 2, 3]), ([], [])):  # fmt: skip
        stream.state = before
        stream.reset(rows)
        for old, new in zip(flat(before), flat(stream.state), strict=True):
            assert not new[:, cleared].any()
            kept = [row for row in range(4) if row not in cleared]
            assert torch.equal(new[:, kept], old[:, kept])


@kinds
@torch.no_grad()
def test_clone_goes_its_own_way(kind: str) -> None:
    stream, x = Stream(make(kind, 4, 5, 2), 2), torch.randn(6, 2, 4)
    stream.chunk(x[:3])
    twin = stream.clone()
    assert equal(twin.state, stream.state)
    ahead = stream.chunk(x[3:])
    assert not equal(twin.state, stream.state)
    del stream
    assert torch.equal(twin.chunk(x[3:]), ahead)


@kinds
@torch.no_grad()
def test_refresh_takes_new_weights_and_keeps_the_state(kind: str) -> None:
    module = make(kind, 4, 5)
    stream, x = Stream(module, 2), torch.randn(2, 4)
    stream.step(x)
    twin, state = stream.clone(), stream.state
    for parameter in module.parameters():
        parameter.mul_(0.5)
    assert equal(stream.state, state)
    old = stream.clone().step(x)
    stream.refresh()
    assert equal(stream.state, state)
    new = stream.step(x)
    assert not torch.equal(old, new)
    assert torch.equal(twin.step(x), old)  # a clone keeps the weights that it shared
    expected = module(x[None], state)[0][0]
    assert torch.allclose(new, expected, atol=1e-6)


@torch.no_grad()
def test_cell_state_stays_in_float32() -> None:
    stream = Stream(make("LSTM", 4, 5, dtype=torch.bfloat16), 2)
    stream.step(torch.randn(2, 4).bfloat16())
    h, c = stream.state
    assert (h.dtype, c.dtype) == (torch.bfloat16, torch.float32)
    assert not torch.equal(c, c.bfloat16().float())
    twin = stream.clone()
    twin.state = (h, c)
    assert equal(twin.state, (h, c))


@pytest.mark.parametrize("space", [torch.nn, fastlm.nn], ids=("torch", "fastlm"))
@kinds
def test_takes_modules_of_both(kind: str, space) -> None:
    module = getattr(space, kind)(3, 4)
    stream = Stream(module, 2)
    assert stream.step(torch.randn(2, 3)).shape == (2, 4)
    assert repr(stream) == f"Stream({module!r}, batch=2)"


@kernels_only
def test_explain_sees_a_stream() -> None:
    report = fastlm.explain(Stream(make("GRU", 4, 5), 2).step, torch.randn(2, 4))
    assert report["backend"] == "cpu"
    assert report["kernel"].startswith("stream (")


def test_misuse_says_what_is_wrong() -> None:
    module = make("GRU", 4, 5)
    x = torch.randn(2, 4)
    for wrong, error, text in (
        ((torch.nn.RNN(4, 5), 2), TypeError, "module: expected a GRU or LSTM"),
        ((torch.nn.Linear(4, 5), 2), TypeError, "module: expected a GRU or LSTM"),
        ((make("GRU", 4, 5, bidirectional=True), 2), ValueError, "module: expected one direction"),
        ((make("LSTM", 4, 5, proj_size=2), 2), ValueError, "module: expected no projection"),
        ((module.half(), 2), ValueError, "module: expected weights of one of"),
        ((module.to("meta"), 2), ValueError, "module: expected"),
        ((make("GRU", 4, 5), 0), ValueError, "batch: expected a whole number of at least 1, got 0"),
        ((make("GRU", 4, 5), 1.5), ValueError, "batch: expected a whole number"),
    ):
        with pytest.raises(error, match=text):
            Stream(*wrong)
    with pytest.raises(
        ValueError, match=r"weight_dtype: expected None, torch\.float32 or torch\.bfloat16, got torch\.float16"
    ):
        Stream(make("GRU", 4, 5), 1, weight_dtype=torch.float16)
    stream = Stream(make("GRU", 4, 5), 2)
    for call, error, text in (
        (lambda: stream.step(x[:1]), ValueError, r"x: expected shape \(B, I\) = \(2, 4\), got \(1, 4\)"),
        (lambda: stream.step(x.double()), ValueError, "x: expected dtype torch.float32"),
        (lambda: stream.step(x.to("meta")), ValueError, "x: expected a CPU tensor"),
        (lambda: stream.step(x.clone().requires_grad_()), RuntimeError, "gives no gradients"),
        (lambda: stream.chunk(x), ValueError, r"x: expected shape \(T, B, I\)"),
        (lambda: stream.chunk(x[None].clone().requires_grad_()), RuntimeError, "gives no gradients"),
        (lambda: stream.step(x, out=torch.empty(2, 4)), ValueError, r"out: expected shape \(B, H\) = \(2, 5\)"),
        (lambda: stream.step(x, out=torch.empty(2, 5).double()), ValueError, "out: expected dtype"),
        (lambda: stream.step(x, out=torch.empty(5, 2).mT), ValueError, "out: expected a dense"),
        (lambda: stream.reset(2), IndexError, "rows: expected 0 to 1"),
        (lambda: stream.reset([0, -1]), IndexError, "got -1"),
        (lambda: stream.reset(1.5), TypeError, "rows: expected whole numbers"),
        (lambda: stream.reset(True), TypeError, "rows: expected whole numbers"),
        (lambda: stream.reset("a"), TypeError, "rows: expected whole numbers"),
        (lambda: stream.step(None), TypeError, "x: expected a Tensor, got NoneType"),
        (lambda: stream.step(x, out=[1.0]), TypeError, "out: expected a Tensor, got list"),
        (lambda: stream.reset(torch.ones(3, dtype=torch.bool)), ValueError, "rows: expected shape"),
        (lambda: setattr(stream, "state", x), ValueError, r"state: h: expected shape \(L, B, H\) = \(1, 2, 5\)"),
        (lambda: setattr(stream, "state", 3), TypeError, "state: expected h to be a Tensor, got int"),
        (lambda: setattr(Stream(make("LSTM", 4, 5), 2), "state", x), TypeError, "state: expected a pair"),
        (lambda: pickle.dumps(stream), TypeError, "cannot be pickled"),
    ):
        with pytest.raises(error, match=text):
            call()
    with torch.no_grad():
        stream.step(x.clone().requires_grad_())


@pytest.mark.usefixtures("two_threads")
@torch.no_grad()
def test_streams_in_many_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    module, x = make("LSTM", 24, 128, 2), torch.randn(10, 1, 24)
    expected = Stream(module, 1).chunk(x)
    streams = [Stream(module, 1) for _ in range(6)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda stream: torch.stack([stream.step(step) for step in x]), streams))
    assert all(torch.allclose(each, expected, atol=1e-6) for each in got)


@kinds
@torch.no_grad()
def test_out_may_be_the_input(kind: str) -> None:
    for sizes, batch in (((64, 64), 1), ((65, 65), 3), ((16, 48), 2)):
        stream, memory = Stream(make(kind, *sizes), batch), torch.randn(2 * batch * 65)
        x, out = memory[: batch * sizes[0]].view(batch, -1), memory[: batch * sizes[1]].view(batch, -1)
        expected = stream.clone().step(x.clone())
        assert torch.equal(stream.clone().step(x.clone(), out=torch.empty_like(out)), expected)
        assert torch.equal(stream.step(x, out=out), expected)


def test_autograd_sees_that_out_is_written() -> None:
    stream, out, head = Stream(make("GRU", 3, 4), 2), torch.zeros(2, 4), torch.nn.Linear(4, 1)
    stream.step(torch.randn(2, 3), out=out)
    loss = head(out).sum()
    stream.step(torch.randn(2, 3), out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        assert stream.step(torch.randn(2, 3), out=torch.zeros(2, 4)).is_inference()
    with pytest.raises(RuntimeError, match="out: expected a Tensor without requires_grad"):
        stream.step(torch.randn(2, 3), out=torch.zeros(2, 4, requires_grad=True))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="x: a Stream gives no tangents"):
        stream.step(forward_ad.make_dual(torch.randn(2, 3), torch.randn(2, 3)))


def test_a_copied_model_packs_its_own_weights() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = torch.nn.GRU(3, 4)
            self.stream = Stream(self.rnn, 2)

    model = copy.deepcopy(Model())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.stream.refresh()
        assert model.stream.step(torch.randn(2, 3)).eq(0).all()


@kernels_only
def test_what_has_no_memory_is_refused():
    stream, x = Stream(torch.nn.GRU(4, 4), 1), torch.randn(1, 4)
    with torch.no_grad(), pytest.raises(ValueError, match="x: expected a tensor with memory of its own"):
        stream.step(torch._efficientzerotensor(1, 4))
    with FakeTensorMode(), torch.no_grad():
        for call in (lambda: stream.step(x), lambda: stream.state, lambda: Stream(torch.nn.GRU(4, 4), 1)):
            with pytest.raises(ValueError, match="memory of its own, got FakeTensor"):
                call()


def test_tracing_is_refused():
    """What it would record has no step in it."""
    stream, x = Stream(torch.nn.GRU(4, 4), 1), torch.randn(1, 4)
    for trace in (make_fx(lambda x: stream.step(x)), lambda x: torch.jit.trace(lambda x: stream.step(x), x)):
        with pytest.raises(RuntimeError, match="x: a Stream cannot be traced"):
            trace(x)


@torch.no_grad()
def test_values_that_lie_negated():
    module, x = make("GRU", 4, 4), torch.randn(3, 1, 4)
    negated = torch._neg_view(-x)
    assert equal(Stream(module, 1).chunk(negated), Stream(module, 1).chunk(x))
    assert equal(Stream(module, 1).step(negated[0]), Stream(module, 1).step(x[0]))
    with pytest.raises(ValueError, match="out: expected a dense CPU tensor"):
        Stream(module, 1).step(x[0], out=torch._neg_view(torch.empty(1, 4)))


HOOKS = {
    "weight_norm": lambda module: torch.nn.utils.weight_norm(module, "weight_hh_l0"),
    "spectral_norm": lambda module: torch.nn.utils.spectral_norm(module.eval(), "weight_hh_l0"),
    "prune": lambda module: torch.nn.utils.prune.l1_unstructured(module, "weight_hh_l0", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@kinds
@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
@torch.no_grad()
def test_weights_that_hooks_compute_are_of_now(kind: str, hook) -> None:
    """Also where nothing has run since what they are made from changed."""
    source, module = (hook(make(kind, 5, 8)) for _ in range(2))
    module.load_state_dict(source.state_dict())
    x = torch.randn(6, 2, 5)
    stream = Stream(module, 2)
    assert torch.allclose(stream.chunk(x), source(x)[0], atol=1e-6)
    for changed in (source, module):
        changed.weight_hh_l0_orig.mul_(-1) if "prune" in str(hook.__code__.co_names) else changed.bias_hh_l0.add_(1)
    stream.refresh()
    stream.reset()
    assert torch.allclose(stream.chunk(x), source(x)[0], atol=1e-6)


@kinds
def test_weights_of_wrong_shapes_are_refused(kind: str) -> None:
    """The kernels get addresses alone and would read past the end."""
    changes = {
        "weight_ih_l0": lambda m: setattr(m, "weight_ih_l0", torch.nn.Parameter(torch.zeros(3, 1))),
        "weight_hh_l1": lambda m: setattr(m, "weight_hh_l1", torch.nn.Parameter(torch.zeros(3, 1))),
        "bias_ih_l0": lambda m: setattr(m, "bias_ih_l0", torch.nn.Parameter(torch.zeros(1))),
        "weight_ih_l0: expected shape": lambda m: setattr(m, "hidden_size", 4096),
        "layers": lambda m: setattr(m, "num_layers", 3),
    }
    for text, change in changes.items():
        module = make(kind, 4, 8, num_layers=2)
        stream = Stream(module, 1)
        change(module)
        for call in (stream.refresh, lambda module=module: Stream(module, 1)):
            with pytest.raises(ValueError, match=text):
                call()
    module = make(kind, 4, 8)
    stream = Stream(module, 1)
    module.__init__(4, 16)
    with pytest.raises(ValueError, match=r"refresh: expected .* sizes \(I, H, L\) = \(4, 8, 1\), got .* \(4, 16, 1\)"):
        stream.refresh()
