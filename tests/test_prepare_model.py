import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb

pytestmark = pytest.mark.usefixtures("cpu_kernels")
call = jax.jit(lambda model, x: model(x))
tokens = jnp.arange(12).reshape(2, 6)


def packed(preset, recipe=None):
    config = lb.models.DecoderConfig(
        vocab=40, dim=32, layers=2, heads=2, kv_heads=1, ffn_dim=64, max_length=16
    )
    model = lb.models.Decoder(config, rngs=nnx.Rngs(0))
    return lb.pack_model(lb.quantize_model(model, recipe or preset))


@pytest.mark.parametrize("preset", ["w4a16_g32", "w1_58a8"])
def test_a_prepared_model_gives_the_same_logits(preset, tmp_path):
    model = packed(preset, lb.Recipe(lb.Rule(".*", preset)))
    prepared = lb.prepare_model(model)
    kinds = {type(twin.matrix).__name__ for _, twin in lb.quantized_layers(prepared)}
    assert kinds == {"Prepared"}  # the embedding too, which is looked up and multiplied
    assert {type(t.matrix).__name__ for _, t in lb.quantized_layers(model)} == {"QTensor"}
    # The products are the same bits; looked-up entries come in another layout, and the norms behind
    # them sum 32 squares in another order.
    tolerance = {"rtol": 32 * 1.2e-7, "atol": 32 * 1.2e-7 * 8}
    np.testing.assert_allclose(call(prepared, tokens), call(model, tokens), **tolerance)
    again = lb.prepare_model(prepared)
    np.testing.assert_array_equal(call(again, tokens), call(prepared, tokens))
    with pytest.raises(ValueError, match="prepared for 'cpu'; what is prepared is for multiplying"):
        lb.checkpoint.save(tmp_path / "never", prepared)


def test_what_cannot_be_prepared():
    float_model = nnx.eval_shape(lambda: nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="no layer of this model is packed"):
        lb.prepare_model(float_model)
    with pytest.raises(NotImplementedError, match=r"layers/0/.*the default backend is 'cpu'"):
        lb.prepare_model(packed("w4a16"), "mosaic_gpu")
    same = lb.prepare_model(packed("w4a16"), "xla")
    assert {type(twin.matrix).__name__ for _, twin in lb.quantized_layers(same)} == {"QTensor"}
