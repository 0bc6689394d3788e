"""Kinds of state that quantized layers add to a model."""

from flax import nnx


class QuantStat(nnx.Variable):
    """A statistic of a quantizer (a calibrated range): changed by `observe` only, never trained."""


class Packed(nnx.Variable):
    """Holds the QTensor of a packed layer; not an nnx.Param, so that no optimizer touches it."""
