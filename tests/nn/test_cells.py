import pytest
import torch

import fastlm
from tests.nn.twins import CELLS, check_twins, make, outputs_of, states

cell = pytest.mark.parametrize("name", CELLS)


@cell
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("with_hx", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("batch", [(), (1,), (4,)], ids=["unbatched", "B1", "B4"])
def test_cell(name: str, bias: bool, with_hx: bool, batch: tuple[int, ...]) -> None:
    ours, theirs = make(name, 5, 7, bias=bias)
    check_twins(ours, theirs, torch.randn(*batch, 5), states(name, (*batch, 7)) if with_hx else None)


@cell
def test_loop_over_steps(name: str) -> None:
    class Loop(torch.nn.Module):
        def __init__(self, cell: torch.nn.Module) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hx = None
            for step in x:
                hx = self.cell(step, hx)
            return hx

    ours, theirs = make(name, 5, 7)
    check_twins(Loop(ours), Loop(theirs), torch.randn(6, 4, 5))


@cell
def test_empty_batch(name: str) -> None:
    ours, theirs = make(name, 5, 7)
    got, expected = (outputs_of(module(torch.randn(0, 5))) for module in (ours, theirs))
    assert {key: value.shape for key, value in got.items()} == {key: value.shape for key, value in expected.items()}


@cell
def test_autocast(name: str) -> None:
    module = make(name, 5, 7)[0]
    for input in (torch.randn(4, 5), torch.randn(4, 5).bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = outputs_of(module(input, states(name, (4, 7))))
        assert {value.dtype for value in got.values()} == {torch.bfloat16}


BAD_CALLS = {
    "input 3-D": lambda name: (torch.randn(2, 1, 5), None),
    "input size": lambda name: (torch.randn(2, 6), None),
    "input size unbatched": lambda name: (torch.randn(6), None),
    "hx 3-D": lambda name: (torch.randn(2, 5), states(name, (1, 2, 7))),
    "hx size": lambda name: (torch.randn(2, 5), states(name, (2, 6))),
    "hx batch": lambda name: (torch.randn(2, 5), states(name, (3, 7))),
    "hx 1-D": lambda name: (torch.randn(2, 5), states(name, (7,))),
    "hx batched": lambda name: (torch.randn(5), states(name, (1, 7))),
}


@cell
@pytest.mark.parametrize("bad", BAD_CALLS.values(), ids=BAD_CALLS)
def test_errors_are_torchs(name: str, bad) -> None:
    ours, theirs = make(name, 5, 7)
    input, hx = bad(name)
    with pytest.raises((RuntimeError, ValueError)) as expected:
        theirs(input, hx)
    with pytest.raises(expected.type) as got:
        ours(input, hx)
    assert str(got.value) == str(expected.value)


def test_second_state_is_checked() -> None:
    with pytest.raises(RuntimeError, match="hidden1 has inconsistent hidden_size: got 6, expected 7"):
        fastlm.nn.LSTMCell(5, 7)(torch.randn(2, 5), (torch.randn(2, 7), torch.randn(2, 6)))


@cell
def test_wrong_dtype_is_named(name: str) -> None:
    module = make(name, 5, 7)[0]
    with pytest.raises(ValueError, match=r"expected dtype torch.float64 .*got torch.float32"):
        module(torch.randn(2, 5).double())
