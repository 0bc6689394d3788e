"""Calibrating static activation statistics now and then, on the batch about to be trained on.

Dynamic activation quantizers (per token) have no statistics, and most models none at all. NVFP4's
activations keep the global scale of each layer, which must be found before the first step and
follows the activations from then on.
"""

from typing import Any

import jax
from flax import nnx

import lowbit_jax as lb
from lowbit_jax.training.step import TrainState


class Calibration:
    """Says when statistics are due, and updates those of a state.

    Args:
        graphdef: Of the model.
        state: Of the model; tells whether it has any lb.QuantStat at all.
        every: Steps between two calibrations.
    """

    def __init__(self, graphdef: Any, state: TrainState, every: int):
        self._graphdef, self._every = graphdef, every
        statistics = bool(jax.tree.leaves(nnx.filter_state(state.rest, lb.QuantStat)))
        model = nnx.merge(graphdef, state.params, state.rest)
        self._starting = bool(lb.surgery.Starting(model))
        self._needed = statistics or self._starting

    def due(self, step: int) -> bool:
        """Whether to calibrate before the step that follows `step` finished ones."""
        return self._needed and step % self._every == 0

    def __call__(self, state: TrainState, windows: Any, *, start: bool = False) -> TrainState:
        """The state with the statistics of one batch [batch, length + 1].

        Parameters stay, but for learned ranges of activations, which the first calibration starts.
        """
        model = nnx.merge(self._graphdef, state.params, state.rest)
        model = lb.calibrate_model(model, [windows[:, :-1]], start=start)
        _, params, rest = nnx.split(model, nnx.Param, ...)
        return state._replace(params=params, rest=rest)
