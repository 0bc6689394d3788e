"""Batches are a function of the step; an epoch predicts every token once; nothing is lost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit_jax.data import TokenBatches, valid_windows

TOKENS = np.arange(1000, dtype=np.uint16)  # a token is its own position


def stream(batches, windows):
    """The first `windows` windows, one after the other."""
    steps = -(-windows // batches.batch)
    return np.concatenate([batches[step] for step in range(steps)])[:windows]


def test_a_batch_is_consecutive_text_of_length_plus_one():
    batch = TokenBatches(TOKENS, batch=4, length=16, seed=0)[3]
    assert (batch.shape, batch.dtype) == ((4, 17), np.int32)
    np.testing.assert_array_equal(np.diff(batch, axis=1), 1)


def test_a_step_gives_the_same_batch_whenever_it_is_asked():
    first = TokenBatches(TOKENS, batch=4, length=16, seed=0)
    forward = [first[step] for step in range(40)]  # more than two epochs
    resumed = TokenBatches(TOKENS.astype(np.int32), batch=4, length=16, seed=0)
    for step in (39, 3, 17, 16, 15, 0):
        np.testing.assert_array_equal(resumed[step], forward[step])


@given(
    tokens=st.integers(2, 400),
    batch=st.integers(1, 5),
    length=st.integers(1, 20),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 3),
)
def test_each_epoch_predicts_its_tokens_once(tokens, batch, length, seed, epoch):
    if (tokens - 1) // length < batch:
        return  # shorter than one batch: an error, tested below
    batches = TokenBatches(np.arange(tokens), batch=batch, length=length, seed=seed)
    count = batches.windows
    windows = stream(batches, (epoch + 1) * count)[epoch * count :]
    targets = np.sort(windows[:, 1:].ravel())
    # One run of positions without a gap or a repetition, of which at most a window is missing at
    # each end.
    np.testing.assert_array_equal(np.diff(targets), 1)
    assert len(targets) > tokens - 1 - 2 * length


def test_epochs_differ_in_order_and_offset_and_seeds_differ():
    batches = TokenBatches(TOKENS, batch=1, length=16, seed=0)
    other = TokenBatches(TOKENS, batch=1, length=16, seed=1)
    n = batches.windows
    starts = [stream(b, 9 * n)[:, 0].reshape(9, n) for b in (batches, other)]
    assert len(np.unique(starts[0][:, 0] % 16)) > 1
    orders = np.argsort(np.concatenate(starts), axis=1)
    assert len(np.unique(orders, axis=0)) == 18
    # Shuffled: neighbours in an epoch are neighbours in the text about once, not n times.
    assert np.mean(np.diff(starts[0], axis=1) == 16) < 0.1


def test_the_order_of_an_epoch_is_fixed_for_good():
    # Philox's raw stream is part of NumPy's promise; a change here would break every resumed run.
    batches = TokenBatches(np.arange(41), batch=1, length=4, seed=7)
    raw = np.random.Philox(key=np.array([7, 1], np.uint64)).random_raw(1 + batches.windows)
    expected = raw[0] % 4 + 4 * np.argsort(raw[1:])
    np.testing.assert_array_equal(stream(batches, 18)[9:, 0], expected)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_hosts_share_the_rows_of_one_global_batch(count):
    whole = TokenBatches(TOKENS, batch=6, length=16, seed=0)
    hosts = [
        TokenBatches(TOKENS, 6, 16, 0, process_index=i, process_count=count) for i in range(count)
    ]
    for step in (0, 9, 10, 30):
        parts = [host[step] for host in hosts]
        assert all(part.shape == (6 // count, 17) for part in parts)
        np.testing.assert_array_equal(np.concatenate(parts), whole[step])


def test_a_file_on_disk_is_read_in_place(tmp_path):
    TOKENS.tofile(tmp_path / "tokens.bin")
    on_disk = np.memmap(tmp_path / "tokens.bin", TOKENS.dtype, "r")
    batches = TokenBatches(on_disk, batch=2, length=8, seed=0)
    assert batches.tokens is on_disk
    np.testing.assert_array_equal(batches[1], TokenBatches(TOKENS, 2, 8, 0)[1])


def test_a_corpus_of_exactly_one_batch_is_enough_and_one_token_less_is_not():
    np.testing.assert_array_equal(
        np.sort(TokenBatches(np.arange(33), batch=4, length=8, seed=0)[0][:, 0]), [0, 8, 16, 24]
    )
    with pytest.raises(
        ValueError,
        match=r"32 tokens .* 4 windows of 8 tokens take 33\. .* 3 windows fit.*more text",
    ):
        TokenBatches(np.arange(32), batch=4, length=8, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, r"batch \(0\) and length \(16\) must be at least 1"),
        ({"length": 0}, "at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"process_count": 3}, r"4 windows does not divide among 3 hosts.*: 6"),
        ({"process_count": 2, "process_index": 2}, r"process_index 2 is not in \[0, 2\)"),
        ({"tokens": TOKENS.astype(np.float32)}, r"integers, not float32\[1000\]"),
        ({"tokens": TOKENS.reshape(2, -1)}, r"flat .* not uint16\[2, 500\]"),
    ],
)
def test_wrong_arguments_are_errors_with_their_values(options, message):
    with pytest.raises(ValueError, match=message):
        TokenBatches(**({"tokens": TOKENS, "batch": 4, "length": 16, "seed": 0} | options))


def test_a_step_before_the_first_is_an_error():
    with pytest.raises(IndexError, match="step -1"):
        TokenBatches(TOKENS, batch=4, length=16, seed=0)[-1]


@given(n=st.integers(2, 100), length=st.integers(1, 12), batch=st.integers(1, 5))
def test_validation_predicts_every_token_but_the_first_once(n, length, batch):
    tokens = np.arange(1, n + 1, dtype=np.uint8)
    predicted = []
    for windows, mask in valid_windows(tokens, length, batch):
        assert windows.shape == (batch, length + 1)
        assert mask.shape == (batch, length)
        inputs, targets = windows[:, :-1][mask], windows[:, 1:][mask]
        np.testing.assert_array_equal(targets, inputs + 1)  # each from the token before it
        predicted.append(targets)
    np.testing.assert_array_equal(np.concatenate(predicted), tokens[1:])


def test_validation_needs_two_tokens():
    with pytest.raises(ValueError, match=r"1 token\(s\)"):
        valid_windows(np.array([1]), length=4, batch=2)
