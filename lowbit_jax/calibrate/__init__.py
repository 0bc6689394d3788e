"""Range finding: array -> Range(scale, zero_point, global_scale).

| function | range | for |
|---|---|---|
| absmax, minmax | the extremes of each block | weights, activations per token |
| absmean | the mean magnitude | ternary and binary weights |
| quantile | all but a share of the elements | outliers |
| mse | searched for the least squared error | few bits |
| exact | of the least squared error, by sorting | ternary, binary |
| sign_value | no range: vectors around a sign matrix | OneBit |
| progressive | integers per output, min-max of groups of them | QServe |
| kl_threshold | from a histogram | static activations |
| stored_scale | of given scales, as they are stored | other ranges |
"""

from lowbit_jax.calibrate.factors import sign_value
from lowbit_jax.calibrate.histogram import kl_threshold
from lowbit_jax.calibrate.progressive import progressive
from lowbit_jax.calibrate.ranges import absmax, absmean, minmax, quantile, stored_scale
from lowbit_jax.calibrate.search import exact, mse
from lowbit_jax.grid import Range

__all__ = [
    "Range",
    "absmax",
    "absmean",
    "exact",
    "kl_threshold",
    "minmax",
    "mse",
    "progressive",
    "quantile",
    "sign_value",
    "stored_scale",
]
