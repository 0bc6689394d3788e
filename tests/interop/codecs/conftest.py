"""Random kernels of any spec, and comparison of two."""

import numpy as np
import pytest

from lowbit_jax import formats
from lowbit_jax.interop.codecs.parts import Kernel, codes_of, make_qtensor
from lowbit_jax.spec import QuantSpec


def random_kernel(spec: QuantSpec, shape: tuple[int, int], seed: int, *, permuted=False) -> Kernel:
    """Any codes, scales of many magnitudes and both signs, one group of zeros."""
    rng = np.random.default_rng(seed)
    fmt, scale_shape = spec.format, spec.scale_shape(shape)
    unused = {"ternary": [3], "fp8_e4m3": [0x7F, 0xFF]}.get(fmt.name, [])
    used = np.setdiff1d(np.arange(2**fmt.bits), unused)
    codes = rng.choice(used, size=shape).astype(np.uint8)
    scale = np.float32(rng.choice([-1, 1], scale_shape) * 2 ** rng.uniform(-9, 3, scale_shape))
    if spec.scale_format.name in ("e4m3", "e8m0"):
        scale = np.abs(scale)
    scale.flat[0] = 0 if spec.scale_format.name != "e8m0" else 1
    zero_point = None
    if not spec.symmetric:
        zero_point = rng.integers(0, 2**spec.bits, scale_shape, dtype=np.uint8)
    divisor = np.float32([[rng.uniform(100, 4000)]]) if spec.has_global_scale else None
    q = make_qtensor(
        codes,
        spec,
        scale.astype(spec.scale_format.dtype),
        zero_point=zero_point,
        global_scale=None if divisor is None else np.float32(1) / divisor,
        where="random",
    )
    permutation = rng.permutation(shape[0]).astype(np.int32) if permuted else None
    if permutation is not None:  # sorted inside of each group, as stable sorting leaves them
        groups = permutation.reshape(scale_shape[0], -1)
        permutation = np.sort(groups, axis=1).reshape(-1)
    return Kernel(q, permutation, divisor)


def assert_same(got: Kernel, wanted: Kernel, *, spec: bool = True) -> None:
    """Codes, zero points, scales, order and values: all bit for bit."""
    a, b = got.qtensor, wanted.qtensor
    if spec:
        assert a.spec == b.spec
        np.testing.assert_array_equal(
            np.asarray(a.scale).view(np.uint8), np.asarray(b.scale).view(np.uint8)
        )
        for name in ("zero_point", "global_scale"):
            assert (getattr(a, name) is None) == (getattr(b, name) is None), name
            if getattr(a, name) is not None:
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        for mine, theirs in zip(a.words, b.words, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(codes_of(a), codes_of(b))
    assert (got.input_permutation is None) == (wanted.input_permutation is None)
    if got.input_permutation is not None:
        np.testing.assert_array_equal(got.input_permutation, wanted.input_permutation)
    np.testing.assert_array_equal(got.dequantize(), wanted.dequantize())


def assert_same_bytes(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert set(got) == set(wanted)
    for name, tensor in wanted.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert got[name].tobytes() == tensor.tobytes(), name


class Kernels:
    random = staticmethod(random_kernel)
    assert_same = staticmethod(assert_same)
    assert_same_bytes = staticmethod(assert_same_bytes)
    formats = formats


@pytest.fixture(scope="session")
def kernels() -> type[Kernels]:
    return Kernels
