"""A checkpoint saved on some devices is read on others: the same bits, each read once."""

import jax
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax.checkpoint import zarr
from lowbit_jax.models import param_shardings


def mesh_of(count):
    tensor = 2 if count > 1 else 1
    return jax.make_mesh(
        (count // tensor, tensor),
        ("fsdp", "tensor"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[:count],
    )


def placed(model, count):
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.device_put(state, param_shardings(state, mesh_of(count))))


@pytest.fixture(scope="module")
def kinds(model, packed):
    """A packed model, one in training with learned scales, and one whose scales are quantized."""
    recipe = lb.Recipe(lb.Rule("layers/.*/(up|gate)", "w4a16_lsq"), lb.Rule("layers/.*", "w1_58a8"))
    train = nnx.jit(lambda m: lb.quantize_model(m, recipe))(model)
    second = lb.Recipe(lb.Rule("layers/.*/(up|down)", "w3a16_g16_spqr"))
    two_levels = nnx.jit(lambda m: lb.pack_model(lb.quantize_model(m, second)))(model)
    return {"packed": packed, "train": train, "two levels": two_levels}


@pytest.mark.parametrize(
    ("kind", "count"),
    [*((k, n) for k in ("packed", "train") for n in (1, 2, 4, 8)), ("two levels", 4)],
)
def test_a_checkpoint_of_any_number_of_devices_is_read_on_any_other(kinds, kind, count, tmp_path):
    model = kinds[kind]
    expected = lb.checkpoint.digest(model)
    lb.checkpoint.save(tmp_path / "c", placed(model, count))
    reference = lb.checkpoint.read_manifest(tmp_path / "c")["tensors"]
    for other in (1, 2, 4, 8):
        loaded = lb.checkpoint.load(tmp_path / "c", mesh=mesh_of(other), verify=True)
        assert lb.checkpoint.digest(loaded) == expected
        leaves = jax.tree.leaves(nnx.state(loaded))
        assert {len(x.sharding.device_set) for x in leaves} == {other}
    lb.checkpoint.save(tmp_path / "again", loaded)
    assert lb.checkpoint.read_manifest(tmp_path / "again")["tensors"] == reference


def test_a_mesh_reads_every_byte_once(saved, packed, monkeypatch):
    """Eight devices that share a process do not read the same chunk eight times."""
    asked = []
    fill = zarr._fill

    def counted(file, array):
        asked.append(array.nbytes)
        fill(file, array)

    monkeypatch.setattr(zarr, "_fill", counted)
    lb.checkpoint.load(saved, mesh=mesh_of(8))
    assert sum(asked) == sum(x.nbytes for x in jax.tree.leaves(nnx.state(packed)))
