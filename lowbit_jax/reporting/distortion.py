"""The squared error of every scalar format on normal values, against what is possible."""

import math
from collections.abc import Sequence
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lowbit_jax import formats
from lowbit_jax.formats import Format, IntGrid
from lowbit_jax.reporting.report import markdown_table

# J. Max, "Quantizing for minimum distortion", IRE Trans. Inf. Theory 6 (1960): mean squared error
# of a standard normal variable by the number of levels.
MAX_UNIFORM: Final = {2: 0.3634, 4: 0.1188, 8: 0.03744, 16: 0.01154}
MAX_NONUNIFORM: Final = {2: 0.3634, 4: 0.1175, 8: 0.03454, 16: 0.009497}


def rate_limit(bits: float) -> float:
    """Least mean squared error of a standard normal variable at a rate, in bits: 2**(-2 bits)."""
    return 2.0 ** (-2 * bits)


def levels_of(fmt: Format) -> int:
    """How many different values the format encodes to."""
    values = np.asarray(fmt.decode(jnp.arange(2**fmt.bits, dtype=jnp.uint8)))
    return len(np.unique(np.asarray(fmt.round(jnp.asarray(values)))))


def normal_distortion(fmt: Format, *, samples: int = 2**22, seed: int = 0) -> tuple[float, float]:
    """Mean squared error on standard normal samples at the best scale, and that scale.

    The scale is searched on 2**15 samples, over a hundredfold range in steps of 4 %, then on all
    around the best in steps of 0.5 %: near its minimum the error is flat.

    Args:
        fmt: The format; symmetric.
        samples: How many, a multiple of 2**15.
        seed: Of the samples.

    Raises:
        ValueError: An unsigned format, whose values need a zero point.
    """
    if isinstance(fmt, IntGrid) and not fmt.signed:
        raise ValueError(
            f"normal_distortion: {fmt.name} needs a zero point; its levels are those of "
            f"{fmt.name.removeprefix('u')}_half."
        )
    x = jax.random.normal(jax.random.key(seed), (samples // 2**15, 2**15), jnp.float32)
    coarse = 0.4 * 1.04 ** np.arange(118) / fmt.max
    near = coarse[int(np.argmin(_errors(fmt, x[:1], coarse)))]
    fine = near * (1 + 0.005 * np.arange(-6, 7))
    errors = _errors(fmt, x, fine)
    best = int(np.argmin(errors))
    return float(errors[best]), float(fine[best])


def _errors(fmt: Format, x: Array, scales: np.ndarray) -> np.ndarray:
    """Mean squared error by scale, summed in float64 over rows of 2**15."""

    @jax.jit
    def of_row(row: Array, scale: Array) -> Array:
        error = fmt.round(row / scale) * scale - row
        return jnp.mean(error * error)

    scales32 = jnp.asarray(scales, jnp.float32)
    by_row = jax.lax.map(lambda row: jax.lax.map(lambda s: of_row(row, s), scales32), x)
    return np.asarray(by_row, np.float64).mean(0)


def distortion_table(
    which: Sequence[Format] | None = None, *, samples: int = 2**22, seed: int = 0
) -> str:
    """A Markdown table of `normal_distortion` by format, ascending in levels, with the limits.

    The limit is the rate-distortion function at R = log2(levels); "Max" is the best quantizer with
    that many levels: uniform for equidistant formats, non-uniform for the others.

    Args:
        which: Default: every registered format without a zero point, and `normal_codebook` of 4, 8
            and 16 levels.
        samples: How many normal samples.
        seed: Of the samples.
    """
    if which is None:
        signed = [f for f in formats.ALL if not isinstance(f, IntGrid) or f.signed]
        which = [*signed, *(formats.normal_codebook(n) for n in (4, 8, 16))]
    rows = []
    for fmt in sorted(which, key=lambda f: (levels_of(f), f.name)):
        error, scale = normal_distortion(fmt, samples=samples, seed=seed)
        levels = levels_of(fmt)
        limit = rate_limit(math.log2(levels))
        known = (MAX_UNIFORM if isinstance(fmt, IntGrid) else MAX_NONUNIFORM).get(levels)
        rows.append(
            (
                fmt.name,
                str(fmt.bits),
                str(levels),
                f"{scale:.4g}",
                f"{error:.4g}",
                "" if known is None else f"{known:.4g}",
                f"{limit:.4g}",
                f"{10 * math.log10(error / limit):.2f}",
            )
        )
    header = ("format", "bits", "levels", "scale", "error", "Max 1960", "2**(-2R)", "dB above it")
    return "\n".join(markdown_table(header, rows)) + "\n"
