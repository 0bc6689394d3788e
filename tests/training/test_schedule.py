import numpy as np
import pytest

from lowbit_jax.training import schedule
from lowbit_jax.training.config import OptimConfig


def rates(config, steps):
    values = schedule.learning_rate(config, steps)
    return np.array([float(values(i)) for i in range(steps + 1)])


def test_warmup_rises_linearly_and_cosine_falls_to_the_stated_share():
    got = rates(OptimConfig(lr=1.0, warmup=4, final_lr=0.1), 20)
    # lr / warmup + (lr - lr / warmup) * i / warmup, then 0.1 + 0.9 * (1 + cos(pi t)) / 2
    t = np.arange(17) / 16
    expected = [0.25, 0.4375, 0.625, 0.8125, *(0.1 + 0.45 * (1 + np.cos(np.pi * t)))]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_two_stages_drop_both_rates_in_the_middle():
    config = OptimConfig(
        lr=1.0, warmup=2, schedule="two_stage", stage2_lr=0.25, weight_decay=0.1, stage2_decay=0.0
    )
    cosine = rates(OptimConfig(lr=1.0, warmup=2), 20)
    ratio = rates(config, 20) / cosine
    np.testing.assert_allclose(ratio[:10], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[11:], 0.25, rtol=1e-6)
    decay = schedule.weight_decay(config, 20)
    assert float(decay(9)) == pytest.approx(0.1)
    assert float(decay(11)) == 0.0


@pytest.mark.parametrize("name", ["cosine", "constant", "two_stage"])
def test_no_warmup_starts_at_the_peak(name):
    assert rates(OptimConfig(lr=0.5, warmup=0, schedule=name), 10)[0] == 0.5


def test_constant_stays():
    np.testing.assert_array_equal(rates(OptimConfig(lr=0.5, warmup=0, schedule="constant"), 9), 0.5)
