"""exp, exp2, tanh and sigmoid of every ISA against extended precision, in units in the last place."""

from collections.abc import Callable

import numpy as np
import pytest

from fastlm import _native
from tests.numerics import kernels_only

pytestmark = kernels_only

DTYPES = (np.float32, np.float64)


def sigmoid(x: np.ndarray) -> np.ndarray:
    # Two forms, so that neither cancels nor overflows.
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, small) / (1 + small)


TRUTH = {"exp": np.exp, "exp2_nonpositive": np.exp2, "tanh": np.tanh, "sigmoid": sigmoid}
MAX_ULP = {
    ("exp", np.float32): 2,
    ("exp2_nonpositive", np.float32): 2,
    ("tanh", np.float32): 4,
    ("sigmoid", np.float32): 4,
}
MAX_ULP_FLOAT64 = 8


def simd(name: str) -> Callable[[np.ndarray], np.ndarray]:
    return getattr(_native.module, f"simd_{name}")


def ulps(got: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Error in units in the last place of the true value, where both are finite in the type of got."""
    rounded = truth.astype(got.dtype)
    with np.errstate(invalid="ignore"):
        return np.abs(got.astype(np.longdouble) - truth) / np.spacing(np.abs(rounded)).astype(np.longdouble)


def sweep(dtype: type, name: str) -> np.ndarray:
    """The whole range of results that are normal numbers: dense in value and, towards zero, in exponent."""
    info = np.finfo(dtype)
    rng = np.random.default_rng(0)
    low, high = float(np.log(info.tiny)) + 0.01, float(np.log(info.max)) - 0.01
    ends = {
        "exp": (low, high),
        "exp2_nonpositive": (float(np.log2(info.tiny)), 0.0),
        "tanh": (-30.0, 30.0),
        "sigmoid": (low, 50.0),
    }[name]
    tiny = np.exp(rng.uniform(np.log(info.tiny), 0, 200_000)) * rng.choice((-1, 1), 200_000)
    x = np.concatenate((np.linspace(*ends, 400_001), rng.uniform(-3, 3, 200_000), tiny)).astype(dtype)
    return -np.abs(x) if name == "exp2_nonpositive" else x


@pytest.mark.parametrize("name", TRUTH)
@pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "fp64"))
def test_error(isa: str, name: str, dtype: type) -> None:
    x = sweep(dtype, name)
    error = ulps(simd(name)(x), TRUTH[name](x.astype(np.longdouble)))
    worst = int(error.argmax())
    limit = MAX_ULP.get((name, dtype), MAX_ULP_FLOAT64)
    assert error[worst] <= limit, f"{name}({x[worst]!r}): {float(error[worst]):.2f} ULP, limit {limit}"


@pytest.mark.parametrize("name", ["exp", "tanh", "sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "fp64"))
def test_special_values(isa: str, name: str, dtype: type) -> None:
    inf, nan = np.inf, np.nan
    x = np.array([0.0, -0.0, inf, -inf, nan, 1e30, -1e30, np.finfo(dtype).max, np.finfo(dtype).min], dtype)
    expected = {
        "exp": [1, 1, inf, 0, nan, inf, 0, inf, 0],
        "tanh": [0, -0.0, 1, -1, nan, 1, -1, 1, -1],
        "sigmoid": [0.5, 0.5, 1, 0, nan, 1, 0, 1, 0],
    }[name]
    np.testing.assert_array_equal(simd(name)(x), np.array(expected, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "fp64"))
def test_exp2_of_special_values(isa: str, dtype: type) -> None:
    info = np.finfo(dtype)
    bottom = float(np.log2(info.tiny))
    x = np.array([0.0, -0.0, -np.inf, np.nan, -1e30, info.min, bottom, bottom - 1, bottom - 20], dtype)
    # Below the normal range there is nothing, for subnormal numbers slow the products that take them.
    expected = np.array([1, 1, 0, np.nan, 0, 0, info.tiny, 0, 0], dtype)
    np.testing.assert_array_equal(simd("exp2_nonpositive")(x), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "fp64"))
def test_edges_of_overflow_and_underflow(isa: str, dtype: type) -> None:
    info = np.finfo(dtype)
    top, bottom = dtype(np.log(np.longdouble(info.max))), dtype(np.log(np.longdouble(info.tiny)))
    # The last 200 arguments whose result still fits, less one for the rounding of the result.
    near = top - np.arange(1, 201).astype(dtype) * np.spacing(top)
    assert (ulps(simd("exp")(near), np.exp(near.astype(np.longdouble))) <= MAX_ULP_FLOAT64).all()
    assert np.isposinf(simd("exp")(np.array([top * 1.01, top * 2], dtype))).all()
    # Below the smallest normal number a result may be rounded to zero, but stays between zero and that number.
    low = np.linspace(float(bottom) * 1.2, float(bottom) * 1.0001, 1001).astype(dtype)
    for name in ("exp", "sigmoid"):
        got = simd(name)(low)
        assert ((got >= 0) & (got <= info.tiny)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "fp64"))
def test_bounds(isa: str, dtype: type) -> None:
    x = np.linspace(-100, 100, 100_001).astype(dtype)
    assert (np.abs(simd("tanh")(x)) <= 1).all()
    s = simd("sigmoid")(x)
    assert ((s >= 0) & (s <= 1)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "fp64"))
def test_denormal_arguments(isa: str, dtype: type) -> None:
    info = np.finfo(dtype)
    x = np.array([info.smallest_subnormal, info.tiny / 8, info.tiny], dtype)
    x = np.concatenate((x, -x))
    np.testing.assert_array_equal(simd("tanh")(x), x)
    np.testing.assert_array_equal(simd("exp")(x), np.ones(6, dtype))
    np.testing.assert_array_equal(simd("sigmoid")(x), np.full(6, 0.5, dtype))


@pytest.mark.parametrize("name", TRUTH)
@pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "fp64"))
def test_every_length_and_place_gives_the_same(isa: str, name: str, dtype: type) -> None:
    """The rest after the last whole vector goes through the same arithmetic."""
    x = np.linspace(-5, 5, 67).astype(dtype)
    whole = simd(name)(x)
    for size in range(68):
        np.testing.assert_array_equal(simd(name)(x[:size].copy()), whole[:size])
