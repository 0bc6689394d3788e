import numpy as np

from lowbit_jax.training.build import load_text


def test_validation_parts_are_spread_over_the_split_and_end_in_whole_batches(tiny):
    tiny.batch, tiny.length = 2, 8
    text = load_text(tiny)
    part = text.valid_part(3, tiny)
    assert len(part) == 3 * 16 + 1
    available = (len(text.valid) - 1) // 16
    for index in range(3):
        start = index * available // 3 * 16
        np.testing.assert_array_equal(
            part[index * 16 : index * 16 + 16], text.valid[start : start + 16]
        )
    assert part[-1] == text.valid[2 * available // 3 * 16 + 16]


def test_zero_or_too_many_batches_mean_the_whole_split(tiny):
    text = load_text(tiny)
    assert text.valid_part(0, tiny) is text.valid
    assert text.valid_part(10**6, tiny) is text.valid
