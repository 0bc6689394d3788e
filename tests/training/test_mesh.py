import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowbit_jax.training.config import MeshConfig, TrainConfig
from lowbit_jax.training.mesh import check_batch, make_mesh, put_batch, state_shardings
from lowbit_jax.training.step import make_train_step, split

STEPS = 4


def losses(model, config, steps=STEPS):
    mesh = make_mesh(config)
    optimizer = optax.sgd(0.1)
    graphdef, state = split(model, optimizer)
    shardings = state_shardings(state, mesh)
    state = jax.device_put(state, shardings)
    step = make_train_step(graphdef, optimizer, shardings=shardings)
    random = np.random.default_rng(0)
    found = []
    for _ in range(steps):
        windows = random.integers(0, 16, (8, 9), dtype=np.int32)
        state, metrics = step(state, put_batch(windows, mesh))
        found.append(float(metrics.loss))
    return np.array(found), state


@pytest.fixture(scope="module")
def on_one_device(toy):
    return losses(toy(), MeshConfig())[0]


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(data=-1), MeshConfig(data=2, fsdp=2, tensor=2)],
    ids=["data", "data-fsdp-tensor"],
)
def test_losses_are_those_of_one_device(toy, mesh, on_one_device):
    got, state = losses(toy(), mesh)
    assert len(jax.tree.leaves(state.params)[0].sharding.device_set) == 8
    # Sums over 64 tokens, and over up to 32 features where they are cut, come in another order: at
    # most 96 roundings a step, which plain SGD at this rate does not amplify.
    roundings = 96 * np.arange(1, STEPS + 1)
    np.testing.assert_array_less(
        np.abs(got - on_one_device), roundings * np.finfo(np.float32).eps * on_one_device
    )


def test_fsdp_and_tensor_cut_kernels_and_their_moments(toy):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    _, state = split(toy(), optax.adam(0.1))
    shardings = state_shardings(state, mesh)
    kernel = shardings.params["up"]["kernel"].get_raw_value()
    moment = optax.tree.get(shardings.opt, "mu")["up"]["kernel"].get_raw_value()
    assert kernel.spec == moment.spec == jax.sharding.PartitionSpec("fsdp", "tensor")


def test_minus_one_takes_what_is_left():
    assert dict(make_mesh(MeshConfig(data=-1, tensor=2)).shape) == {
        "data": 4,
        "fsdp": 1,
        "tensor": 2,
    }
    assert make_mesh(MeshConfig()).size == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=9), "needs 9 devices, and 8 are visible"),
        (MeshConfig(data=-1, fsdp=3), "needs a multiple of 3 devices, and 8 are visible"),
        (MeshConfig(data=-1, fsdp=-1), "at most one may be -1"),
        (MeshConfig(data=0), "sizes are >= 1"),
    ],
)
def test_meshes_that_do_not_fit_are_refused_with_the_numbers(config, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(config)


def test_a_batch_that_does_not_split_names_the_next_that_do():
    mesh = make_mesh(MeshConfig(data=-1))
    with pytest.raises(ValueError, match=r"parts of 10 rows does not split over 8 .*fit: 16 or 32"):
        check_batch(TrainConfig(batch=20, accumulate=2), mesh)


def test_batches_lie_on_all_devices():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    batch = put_batch(np.zeros((8, 5), np.int32), mesh)
    assert batch.sharding.shard_shape(batch.shape) == (1, 5)
    assert jnp.sum(batch) == 0
