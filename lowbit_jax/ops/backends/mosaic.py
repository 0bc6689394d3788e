"""Pallas kernels: Mosaic GPU (Hopper) and Mosaic TPU, and either in its interpreter."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import kernels_pallas
from lowbit_jax.formats import IntGrid
from lowbit_jax.ops.backends import levels

_PLATFORMS = {"mosaic_gpu": "gpu", "mosaic_tpu": "tpu"}


@dataclasses.dataclass(frozen=True)
class Mosaic:
    """One of the two, on its device or interpreted anywhere."""

    name: Literal["mosaic_gpu", "mosaic_tpu"]
    interpret: bool = False

    def why_not(self, meta: Any, act: str | None) -> str | None:
        """Why there is no kernel: another platform, or none for such codes."""
        platform = _PLATFORMS[self.name]
        if not self.interpret and jax.default_backend() != platform:
            return f"the default backend is {jax.default_backend()!r}, not {platform!r}"
        try:
            problem = self._problem(meta, act, jnp.float32, jnp.float32)
        except (ValueError, NotImplementedError) as error:
            return str(error)
        return kernels_pallas.supported(problem, self.name)

    def prepare_words(self, words: tuple[Array, ...], meta: Any) -> Any:
        """In the order in which the kernel's registers want them."""
        problem = self._problem(meta, None, jnp.float32, jnp.float32)
        return kernels_pallas.prepare(words, problem, self.name)

    def canonical_words(self, words: Any, meta: Any) -> tuple[Array, ...]:
        """The inverse of `prepare_words`."""
        problem = self._problem(meta, None, jnp.float32, jnp.float32)
        return kernels_pallas.restore(words, problem, self.name)

    def columns(self, words: Any, meta: Any, at: Int[Array, "m"]) -> tuple[Array, ...]:
        """The canonical words of some columns."""
        planes = self.canonical_words(words, meta)
        return tuple(jnp.take(plane, at, axis=-1) for plane in planes)

    def product(
        self, x: Float[Array, "m k"], matrix: Any, act: str | None, out_dtype: Any
    ) -> Float[Array, "m n"]:
        """x @ matrix, as `out_dtype`."""
        problem = self._problem(matrix.meta, act, x.dtype, out_dtype)
        words = matrix.words
        if matrix.meta.target != self.name:
            words = kernels_pallas.prepare(words, problem, self.name)
        return kernels_pallas.matmul(
            x,
            words,
            matrix.scale,
            matrix.zero_point,
            problem=problem,
            backend=self.name,
            interpret=self.interpret,
        )

    def _problem(self, meta: Any, act: Any, x_dtype: Any, out_dtype: Any) -> kernels_pallas.Problem:
        fmt = meta.spec.format
        rule: kernels_pallas.Affine | kernels_pallas.Table
        if isinstance(fmt, IntGrid):
            # Ternary and narrow ranges leave codes unused.
            count = int((fmt.qmax - fmt.low) / fmt.step) + 1
            rule = kernels_pallas.Affine(low=fmt.low, step=float(fmt.step), count=count)
        else:
            rule = kernels_pallas.Table(levels.table(fmt))
        return kernels_pallas.Problem(
            bits=fmt.bits,
            levels=rule,
            k=meta.k,
            n=meta.n,
            group=meta.group or meta.k,
            zero_points=not meta.spec.symmetric,
            act=act,
            x_dtype=jnp.dtype(x_dtype).name,
            out_dtype=jnp.dtype(out_dtype).name,
        )


GPU = Mosaic("mosaic_gpu")
TPU = Mosaic("mosaic_tpu")
INTERPRETED = Mosaic("mosaic_tpu", interpret=True)
