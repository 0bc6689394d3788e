import errno

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowbit_jax as lb
from lowbit_jax.training.checkpoints import Checkpoints
from lowbit_jax.training.config import MeshConfig
from lowbit_jax.training.errors import CheckpointError, DiskFull
from lowbit_jax.training.mesh import make_mesh, put_batch, state_shardings
from lowbit_jax.training.step import make_train_step, split


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


MESHES = {
    1: MeshConfig(data=1),
    2: MeshConfig(data=1, fsdp=2),
    4: MeshConfig(data=2, fsdp=1, tensor=2),
    8: MeshConfig(data=2, fsdp=2, tensor=2),
}


@pytest.fixture(scope="module")
def quantized(toy):
    """A model with learned scales and calibrated ranges, its optimizer, and a batch."""
    recipe = lb.Recipe(lb.Rule("up", "w4a16_lsq"), lb.Rule("down", "nvfp4"))
    model = lb.quantize_model(toy(), recipe)
    windows = np.random.default_rng(0).integers(0, 16, (8, 9)).astype(np.int32)
    model = lb.calibrate_model(model, [windows[:, :-1]])
    optimizer = optax.adam(1e-2)
    return *split(model, optimizer), optimizer, windows


def placed(state, mesh):
    return jax.device_put(state, state_shardings(state, mesh), may_alias=False)


@pytest.fixture(scope="module")
def after_three_steps(quantized):
    """A state in which every leaf has moved, and the loss of its next step on one device."""
    graphdef, state, optimizer, windows = quantized
    mesh = make_mesh(MESHES[1])
    step = make_train_step(graphdef, optimizer)
    state = placed(state, mesh)
    for _ in range(3):
        state, _ = step(state, put_batch(windows, mesh))
    kept = jax.tree.map(jnp.copy, state)
    return kept, step(state, put_batch(windows, mesh))[1].loss


@pytest.mark.parametrize("saved_on", MESHES)
def test_quantized_training_goes_on_with_any_number_of_devices(
    saved_on, quantized, after_three_steps, tmp_path
):
    graphdef, _, optimizer, windows = quantized
    after_three_steps, next_loss = after_three_steps
    expected = numbers(after_three_steps)
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(after_three_steps)]
    assert any("kernel_scale" in name for name in names), "a learned scale"
    assert any("input_" in name for name in names), "a calibrated range"
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, placed(after_three_steps, make_mesh(MESHES[saved_on])), {})
        for count, config in MESHES.items():
            mesh = make_mesh(config)
            like = placed(jax.tree.map(jnp.zeros_like, after_three_steps), mesh)
            _, state, _ = checkpoints.restore(like)
            for got, want in zip(numbers(state), expected, strict=True):
                np.testing.assert_array_equal(got, want)
            assert {len(x.sharding.device_set) for x in jax.tree.leaves(state)} == {count}
            if {saved_on, count} == {1, 8}:
                step = make_train_step(graphdef, optimizer, shardings=state_shardings(state, mesh))
                _, metrics = step(state, put_batch(windows, mesh))
                # float32 sums over 64 tokens and 32 features in another order, terms below 16.
                atol = (64 + 32) * np.finfo(np.float32).eps * 16
                np.testing.assert_allclose(metrics.loss, next_loss, rtol=0, atol=atol)
