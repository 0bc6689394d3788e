import time

import jax.numpy as jnp

from experiments.benchmarks.timing import interleaved


def test_every_contender_is_timed_once_a_round_and_ratios_are_to_the_baseline():
    calls = []

    def contender(name, seconds):
        def run():
            calls.append(name)
            time.sleep(seconds)
            return jnp.zeros(())

        return run

    timings = interleaved(
        {"base": contender("base", 0.0), "slow": contender("slow", 0.03)}, rounds=5, baseline="base"
    )
    assert [sorted(calls[i : i + 2]) for i in range(0, 10, 2)] == [["base", "slow"]] * 5
    base, slow = timings
    assert base.ratio == base.ratio_low == base.ratio_high == 1.0
    assert slow.median >= 0.03  # a sleep never ends early
    assert slow.ratio > 1
