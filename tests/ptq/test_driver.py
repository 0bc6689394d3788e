"""The driver: chains, resume, refusal, and what comes out of it."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax import ptq
from lowbit_jax.ptq import driver
from lowbit_jax.testing import assert_same_bits

RECIPE = lb.Recipe(lb.Rule(".*/down", "w4a8"), lb.Rule(".*", "w3a16_asym"))


def moved(model, other, batches):
    """Mean squared difference of logits."""
    return float(np.mean([jnp.mean((model(b) - other(b)) ** 2) for b in batches]))


def leaves(model):
    return dict(nnx.to_flat_state(nnx.state(model)))


@pytest.fixture(scope="module")
def solved(decoder, batches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model, report = ptq.run(decoder, RECIPE, batches, [ptq.GPTQ()], workdir=folder)
    return model, report, folder


def test_the_argument_is_left_untouched_and_every_layer_of_the_blocks_is_quantized(
    decoder, batches, solved
):
    model, _, _ = solved
    assert not list(lb.quantized_layers(decoder))
    paths = [path for path, _ in lb.quantized_layers(model)]
    assert len(paths) == 2 * 7
    assert all(path.startswith("layers/") for path in paths)


def test_packed_and_fake_quantized_models_have_the_same_weights_bit_for_bit(batches, solved):
    model, _, _ = solved
    packed = lb.pack_model(model)
    for (path, old), (_, new) in zip(
        lb.quantized_layers(model), lb.quantized_layers(packed), strict=True
    ):
        assert_same_bits(new.quantized_kernel(), old.quantized_kernel(), path)
    # The sums of up to 24 products, in 2 blocks and a head, have another order.
    np.testing.assert_allclose(packed(batches[0]), model(batches[0]), rtol=0, atol=2e-5)
    # Three bits and four, padded from 16 or 24 inputs to 32, and a scale for so few of them.
    assert lb.summary(packed).bits_per_weight < 12


def test_gptq_moves_the_logits_less_than_round_to_nearest(decoder, batches, solved):
    nearest, _ = ptq.run(decoder, RECIPE, batches, [ptq.RoundToNearest()])
    assert moved(solved[0], decoder, batches) < moved(nearest, decoder, batches)


def test_the_report_has_a_row_for_every_layer_and_block_and_so_has_the_file(solved):
    _, report, folder = solved
    assert [row["block"] for row in report.blocks] == ["layers/0", "layers/1"]
    assert len(report.layers) == 14
    for row in report.layers:
        assert row["error_after"] < row["error_before"]
        assert row["damping"] == 0.01
    kinds = [
        json.loads(line)["kind"] for line in (folder / "events.jsonl").read_text().splitlines()
    ]
    assert kinds.count("layer") == 14
    assert kinds.count("block") == 2
    assert report.peak_memory_bytes > 0


def test_a_run_that_stops_after_a_block_goes_on_there_and_ends_with_the_same_bits(
    decoder, batches, solved, tmp_path, monkeypatch
):
    model, report, _ = solved
    blocks = driver._block
    calls = []

    def dies(*args):
        calls.append(args[0].name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return blocks(*args)

    monkeypatch.setattr(driver, "_block", dies)
    with pytest.raises(KeyboardInterrupt):
        ptq.run(decoder, RECIPE, batches, [ptq.GPTQ()], workdir=tmp_path)
    # Killed in the middle of writing the next block, too.
    shutil.copytree(tmp_path / "blocks" / "0000", tmp_path / "blocks" / ".0001.partial")
    calls.clear()
    monkeypatch.setattr(driver, "_block", lambda *args: calls.append(args[0].name) or blocks(*args))
    again, resumed = ptq.run(decoder, RECIPE, batches, [ptq.GPTQ()], workdir=tmp_path)
    assert calls == ["layers/1"]
    for path, leaf in leaves(model).items():
        assert_same_bits(leaves(again)[path][...], leaf[...], "/".join(map(str, path)))
    assert [row["layer"] for row in resumed.layers] == [row["layer"] for row in report.layers]


def test_a_folder_of_another_run_is_refused_by_what_differs(decoder, batches, solved):
    with pytest.raises(ValueError, match=r"another run: batches, pipeline differ"):
        ptq.run(decoder, RECIPE, batches[:2], [ptq.RoundToNearest()], workdir=solved[2])


def test_results_repeat_bit_for_bit(decoder, batches, solved):
    again, _ = ptq.run(decoder, RECIPE, batches, [ptq.GPTQ()])
    for path, leaf in leaves(solved[0]).items():
        assert_same_bits(leaves(again)[path][...], leaf[...], "/".join(map(str, path)))


def test_embedding_and_head_are_quantized_when_they_are_included(decoder, batches):
    model, _ = ptq.run(decoder, "w8a16", batches, [ptq.RoundToNearest()], include=("embed", "head"))
    paths = [path for path, _ in lb.quantized_layers(model)]
    assert {"embed", "head"} < set(paths)
    for name in ("embed", "head"):
        twin, layer = getattr(model, name), getattr(decoder, name)
        kernel = layer.embedding[...] if name == "embed" else layer.kernel[...]
        error = jnp.sum((twin.quantized_kernel() - kernel) ** 2) / jnp.sum(kernel**2)
        # scale**2 / 12 with scale = 2 absmax / 255, and absmax at most four deviations.
        assert error < 1e-4


def test_qat_starts_from_a_ptq_result(batches, solved):
    model = nnx.clone(solved[0])
    tokens = batches[0]

    def loss(model):
        log_p = jax.nn.log_softmax(model(tokens)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1))

    graphdef, parameters, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def step(parameters):
        value, gradients = jax.value_and_grad(lambda p: loss(nnx.merge(graphdef, p, rest)))(
            parameters
        )
        moved = jax.tree.map(lambda p, g: p - 0.03 * g, parameters, gradients)
        return moved, value, gradients

    losses = []
    for _ in range(30):
        parameters, value, gradients = step(parameters)
        losses.append(float(value))
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients)) > 0
    # A single step across a rounding may go up; thirty do not.
    assert losses[-1] < losses[0] - 0.05


def test_a_checkpoint_of_the_result_loads_packed(batches, solved, tmp_path):
    packed = lb.pack_model(solved[0])
    lb.checkpoint.save(tmp_path / "packed", packed)
    loaded = lb.checkpoint.load(tmp_path / "packed")
    assert_same_bits(loaded(batches[0]), packed(batches[0]))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"blocks": "nothing"}, ValueError, "matches no module"),
        ({"blocks": "layers/0|layers/0/mlp"}, ValueError, "lies inside"),
        ({"blocks": r"layers/\d+/mlp"}, ValueError, "not the output of"),
        ({"blocks": "layers/1|embed"}, NotImplementedError, "embed is a Embed itself; a block"),
        ({"recipe": lb.Recipe(lb.Rule("nothing", "w4a16"))}, ValueError, "matches no layer"),
        ({"recipe": "w4a16_g32"}, ValueError, "layers/0/attention/key: .* groups of 32"),
        ({"pipeline": []}, ValueError, "pipeline is empty"),
        ({"pipeline": [ptq.SmoothQuant()]}, ValueError, "no stage of the pipeline solved it"),
        ({"batches": []}, ValueError, "there was no batch"),
        ({"include": ("hed",)}, ValueError, "Nearest: .*'head'"),
        ({"memory_limit": 1000}, MemoryError, "0.00 GB are available"),
    ],
)
def test_wrong_input_is_refused_before_any_work(decoder, batches, changes, error, message):
    arguments = {"recipe": "w4a16", "batches": batches, "pipeline": [ptq.GPTQ()]} | changes
    with pytest.raises(error, match=message):
        ptq.run(decoder, **arguments)


def test_too_few_tokens_are_refused_with_the_numbers(decoder):
    few = [jnp.zeros((1, 4), jnp.int32)]
    with pytest.raises(ValueError, match="4 tokens, fewer than its 16 inputs"):
        ptq.run(decoder, "w4a16", few, [ptq.GPTQ()])


def test_a_token_outside_the_vocabulary_names_its_batch(decoder, batches):
    wrong = batches[1].at[0, 0].set(99)
    with pytest.raises(ValueError, match=r"calibration batch 1: .* outside the vocabulary"):
        ptq.run(decoder, "w4a16", [batches[0], wrong], [ptq.GPTQ()])


def test_stacked_layers_are_refused_with_the_way_out():
    config = lb.models.DecoderConfig(
        vocab=8, dim=8, layers=2, heads=2, kv_heads=2, ffn_dim=8, max_length=8, stacked=True
    )
    model = lb.models.Decoder(config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="stacked=False"):
        ptq.run(model, "w4a16", [jnp.zeros((1, 8), jnp.int32)], [ptq.GPTQ()])


class Own(nnx.Module):
    """A model of a user's own: three kinds of layers, blocks with further arguments."""

    def __init__(self, rngs):
        self.stages = nnx.List([OwnStage(rngs) for _ in range(2)])

    def __call__(self, x):
        bias = jnp.ones((1, 1, 1, 4)) * 0.1
        for stage in self.stages:
            x = stage(x, bias, flag=True)
        return x.mean(axis=(1, 2))


class OwnStage(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(4, 8, (3, 3), feature_group_count=2, rngs=rngs)
        self.linear = nnx.LinearGeneral(8, 4, rngs=rngs)
        self.experts = nnx.Einsum("bhwc,cd->bhwd", (4, 4), rngs=rngs)

    def __call__(self, x, bias, *, flag):
        assert flag
        return self.experts(nnx.relu(self.linear(nnx.relu(self.conv(x))))) + bias


def test_any_chain_of_blocks_is_quantized_convolutions_and_einsums_too():
    model = Own(nnx.Rngs(0))
    images = [jax.random.normal(jax.random.key(i), (8, 6, 6, 4)) for i in range(2)]
    quantized, report = ptq.run(model, "w3a16_asym", images, [ptq.GPTQ()], blocks=r"stages/\d+")
    assert [row["layer"] for row in report.layers[:3]] == ["conv", "linear", "experts"]
    for row in report.layers:
        assert row["error_after"] < row["error_before"]
    # Three layers of float32 sums, whose order differs: squared, 1e-6 of outputs of about 1.
    assert moved(lb.pack_model(quantized), quantized, images) < 1e-12
