import errno

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowbit_jax.training.checkpoints import Checkpoints
from lowbit_jax.training.errors import CheckpointError, DiskFull
from lowbit_jax.training.step import split


@pytest.fixture
def state(toy):
    return split(toy(dropout=0.5), optax.adam(1e-3))[1]


def numbers(state):
    return [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for x in jax.tree.leaves(state)
    ]


def test_round_trip_is_exact_and_keeps_two(tmp_path, state):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state, {"window": [0.1, 0.2]})
        checkpoints.save(3, state, {"window": []})  # exists already: nothing happens
        assert checkpoints.steps() == [2, 3]
    with Checkpoints(tmp_path) as checkpoints:
        step, restored, meta = checkpoints.restore(state)
    assert (step, meta) == (3, {"window": [0.1, 0.2]})
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(numbers(restored), numbers(state), strict=True):
        np.testing.assert_array_equal(a, b)


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damage_is_named_and_an_older_checkpoint_is_offered_not_taken(tmp_path, state, damage):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.save(2, state, {})
    path = largest_file(tmp_path / "checkpoints" / "2")
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.restore(state)
    assert path.name in str(error.value)
    assert "The checkpoint of step 1 is older and not touched" in str(error.value)
    assert (tmp_path / "checkpoints" / "1").exists()


def test_another_model_and_a_foreign_folder_are_refused(tmp_path, state):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"other": jnp.zeros(3)}, {})
        with pytest.raises(CheckpointError, match=r"it holds another model \(\d+ arrays differ"):
            checkpoints.restore(state)
    foreign = tmp_path / "foreign"
    (foreign / "checkpoints" / "7").mkdir(parents=True)
    with (
        Checkpoints(foreign) as checkpoints,
        pytest.raises(
            CheckpointError, match=r"checkpoints/7: cannot be read: .*There is no older one"
        ),
    ):
        checkpoints.restore(state)


def test_a_full_disk_is_one_message_and_earlier_checkpoints_stay(tmp_path, state, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})

        def full(*_, **__):
            # As tensorstore wraps the system's error: only the text is left of it.
            raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")

        monkeypatch.setattr(checkpoints._manager, "save", full)
        with pytest.raises(DiskFull, match=r"checkpoint of step 2 .* steps \[1\] are intact"):
            checkpoints.save(2, state, {})
        monkeypatch.setattr(
            checkpoints._manager,
            "save",
            lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EIO, "x")),
        )
        with pytest.raises(OSError, match="x"):
            checkpoints.save(2, state, {})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state)[0] == 1
