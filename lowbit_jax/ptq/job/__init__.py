"""Post-training quantization as a job: from one config to a finished folder."""

from lowbit_jax.ptq.job.config import QuantizeConfig
from lowbit_jax.ptq.job.run import Source, quantize

__all__ = ["QuantizeConfig", "Source", "quantize"]
