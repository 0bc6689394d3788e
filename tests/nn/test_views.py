"""The matrix view of every layer against plain numpy indexing."""

import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from lowbit_jax.nn import views


def abstract(make):
    return nnx.eval_shape(lambda: make(nnx.Rngs(0)))


def numbered(shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


# name: (layer, view, element (stack, k, n) of the matrix as an index of the kernel)
LINEAR_GENERAL = lambda r: nnx.LinearGeneral(  # noqa: E731
    (2, 3), (4, 5), axis=(-2, -1), batch_axis={0: 6}, rngs=r
)
CASES = {
    "linear": (
        lambda r: nnx.Linear(3, 5, rngs=r),
        views.linear_view,
        ((), (3,), (5,)),
        lambda s, k, n: (*k, *n),
    ),
    "linear_general": (
        LINEAR_GENERAL,
        views.linear_general_view,
        ((6,), (2, 3), (4, 5)),
        lambda s, k, n: (*s, *k, *n),
    ),
    "einsum": (
        lambda r: nnx.Einsum("bted,hefd->bthef", (2, 3, 4, 5), rngs=r),
        views.einsum_view,
        ((3,), (5,), (2, 4)),
        lambda s, k, n: (n[0], s[0], n[1], k[0]),
    ),
    "einsum_ellipsis": (
        lambda r: nnx.Einsum("...hk,dhk->...d", (7, 2, 3), rngs=r),
        views.einsum_view,
        ((), (2, 3), (7,)),
        lambda s, k, n: (*n, *k),
    ),
    "conv": (
        lambda r: nnx.Conv(4, 6, (2, 3), rngs=r),
        views.conv_view,
        ((), (2, 3, 4), (6,)),
        lambda s, k, n: (*k, *n),
    ),
    "conv_groups": (
        lambda r: nnx.Conv(4, 6, (3,), feature_group_count=2, rngs=r),
        views.conv_view,
        ((2,), (3, 2), (3,)),
        lambda s, k, n: (*k, 3 * s[0] + n[0]),
    ),
    "embed": (
        lambda r: nnx.Embed(7, 3, rngs=r),
        views.embed_view,
        ((), (3,), (7,)),
        lambda s, k, n: (*n, *k),
    ),
}


def product(sizes):
    return list(itertools.product(*map(range, sizes)))


@pytest.mark.parametrize("lead", [(), (2,)], ids=["plain", "stacked"])
@pytest.mark.parametrize("name", CASES)
def test_element_stack_k_n_of_the_matrix_is_that_of_the_kernel(name, lead):
    make, view_of, (stack, k, n), element = CASES[name]
    layer = abstract(make)
    view = view_of(layer)
    kernel = numbered((*lead, *view.kernel_shape))
    matrix = view.to_matrix(kernel)
    assert matrix.shape == (*lead, *stack, np.prod(k), np.prod(n))
    assert view.lead(kernel.ndim) == len(lead)
    for front in product(lead):
        for s in product(stack):
            for (i, ks), (j, ns) in itertools.product(enumerate(product(k)), enumerate(product(n))):
                assert matrix[(*front, *s, i, j)] == kernel[(*front, *element(s, ks, ns))]
    np.testing.assert_array_equal(view.from_matrix(matrix), kernel)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("name", ["linear", "linear_general", "einsum", "einsum_ellipsis", "conv"])
def test_an_expanded_scale_broadcasts_as_in_the_matrix(name, granularity):
    make, view_of, (stack, _, n), _ = CASES[name]
    view = view_of(abstract(make))
    kernel = numbered(view.kernel_shape)
    scale = numbered((*stack, 1, np.prod(n) if granularity == "channel" else 1))
    expected = view.from_matrix(np.broadcast_to(scale, view.matrix_shape))
    expanded = view.expand_scale(scale, kernel.ndim)
    assert expanded.ndim == kernel.ndim
    np.testing.assert_array_equal(np.broadcast_to(expanded, kernel.shape), expected)


def test_a_scale_is_not_laid_over_a_grouped_convolution():
    view = views.conv_view(abstract(CASES["conv_groups"][0]))
    with pytest.raises(NotImplementedError, match="axes were split"):
        view.expand_scale(np.ones((2, 1, 3), np.float32), 3)


def test_an_einsum_without_a_contraction_has_no_view():
    layer = abstract(lambda r: nnx.Einsum("ab,cd->abcd", (2, 3), rngs=r))
    with pytest.raises(ValueError, match=r"'ab,cd->abcd' contracts no axis"):
        views.einsum_view(layer)
    layer.einsum_str = None
    with pytest.raises(ValueError, match="no fixed contraction"):
        views.einsum_view(layer)


def test_views_are_hashable_and_work_on_shapes_alone():
    layer = abstract(CASES["linear_general"][0])
    assert isinstance(layer.kernel.get_value(), jax.ShapeDtypeStruct)
    assert hash(views.linear_general_view(layer)) == hash(views.linear_general_view(layer))
