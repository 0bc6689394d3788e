"""The MNIST table: what a run leaves, what is skipped and refused, and what the table says."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from experiments import mnist, mnist_rows
from lowbit_jax.data.images import ImageData, LabelledImages, load_images
from lowbit_jax.models import MLPConfig
from lowbit_jax.training import classifier

ROWS = {row.name: row for row in mnist_rows.rows()}
TINY = dataclasses.replace(
    ROWS["binaryconnect"],
    model=MLPConfig(4, (8,), 2, norm=True),
    training=dataclasses.replace(ROWS["binaryconnect"].training, batch=16, epochs=2, validation=16),
)


def split(count: int, seed: int) -> LabelledImages:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count, np.int32)
    images = rng.integers(0, 128, (count, 2, 2, 1), np.uint8)
    images[:, 0] += np.uint8(100) * labels.astype(np.uint8)[:, None, None]
    return LabelledImages(images, labels)


DATA = ImageData(split(64, 0), split(40, 1), classes=2)


@pytest.fixture
def measured(monkeypatch):
    """Replaces training by errors that a test chooses; returns what was asked for."""
    asked = []

    def measure(row, data, folder, seed):
        asked.append((row.name, seed))
        packed = None if not row.recipe else 1.0 + 0.1 * seed
        return {
            "row": row.name,
            "seed": seed,
            "error": 1.0 + 0.2 * seed,
            "packed_error": packed,
            "bits_per_weight": 1.0 if row.recipe else 32.0,
            "seconds": 90.0,
        }

    monkeypatch.setattr(mnist, "measure", measure)
    return asked


def tiny(name, **changes):
    return dataclasses.replace(TINY, name=name, title=name, **changes)


def test_a_run_leaves_its_errors_and_the_packed_model(tmp_path):
    summary = mnist.run(TINY, DATA, tmp_path / "run", seed=0)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert len(summary["losses"]) == 2
    packed = lb.checkpoint.load(tmp_path / "run" / "packed")
    assert lb.recipe_of(packed) is not None
    wrong = classifier.error(packed, mnist.forward, DATA.test)
    assert wrong == summary["packed_error"]
    # Codes are the same; sums in another order may move an image that lies on the border.
    assert abs(summary["packed_error"] - summary["error"]) <= 100 / len(DATA.test)


def test_the_table_has_means_and_deviations_and_says_what_was_reached(measured, tmp_path):
    rows = [
        tiny("good", figure=1.0),
        tiny("bad", figure=0.8),
        tiny("float", figure=None, recipe=""),
    ]
    text = mnist.table(rows, DATA, tmp_path, [0, 1, 2])
    lines = {line.split(" | ")[0]: line for line in text.splitlines()}
    # 1.0, 1.2, 1.4 and 1.0, 1.1, 1.2: deviations 0.2 and 0.1; 1.1 <= 1.0 + 0.2, but not 0.8 + 0.2.
    assert "| 1.00 | 1.20 ± 0.20 | 1.10 ± 0.10 | 1.00 | 2 | 3 | 1.5 | yes |" in lines["| good"]
    assert lines["| bad"].endswith("| no |")
    assert "|  | 1.20 ± 0.20 |  | 32.00 |" in lines["| float"]
    assert f"- good: {TINY.note}." in lines
    assert (tmp_path / "mnist.md").read_text() == text
    results = json.loads((tmp_path / "mnist.json").read_text())
    assert [result["reached"] for result in results] == [True, False, None]
    assert results[0]["packed_error"]["mean"] == pytest.approx(1.1)


def test_what_is_finished_is_not_trained_again(measured, tmp_path):
    rows = [tiny("a"), tiny("b")]
    mnist.table(rows[:1], DATA, tmp_path, [0])
    text = mnist.table(rows, DATA, tmp_path, [0, 1])
    assert measured == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert mnist.table(rows, DATA, tmp_path, [0, 1]) == text
    assert len(measured) == 4


def test_a_run_that_was_cut_off_is_started_anew(measured, tmp_path):
    mnist.table([TINY], DATA, tmp_path, [0])
    (tmp_path / "binaryconnect-seed0" / "summary.json").unlink()
    mnist.table([TINY], DATA, tmp_path, [0])
    assert len(measured) == 2


def test_a_folder_of_another_config_or_other_images_is_refused(measured, tmp_path):
    mnist.table([TINY], DATA, tmp_path, [0])
    training = dataclasses.replace(TINY.training, lr=0.5)
    changed = dataclasses.replace(TINY, training=training, title="other words are fine")
    with pytest.raises(ValueError, match=r"another config.*\n  training.lr: 0.001 -> 0.5\nPass"):
        mnist.table([changed], DATA, tmp_path, [0])
    with pytest.raises(ValueError, match=r"another config.*\n  data: "):
        mnist.table([TINY], dataclasses.replace(DATA, test=split(40, 2)), tmp_path, [0])


def test_images_that_do_not_fit_are_refused_before_anything_is_trained(measured, tmp_path):
    for name in ("binaryconnect", "twn"):
        with pytest.raises(ValueError, match=f"2 x 2 pixels.*do not fit the row '{name}'"):
            mnist.table([TINY, ROWS[name]], DATA, tmp_path, [0])
    few = dataclasses.replace(TINY, model=MLPConfig(4, (8,), 1))
    with pytest.raises(ValueError, match=r"2 classes do not fit"):
        mnist.table([few], DATA, tmp_path, [0])
    assert not measured


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_the_recipe_of_a_row_fits_its_network(row):
    recipe = lb.Recipe.from_string(row.recipe)
    model = nnx.eval_shape(lambda: mnist.build(row, 0))
    if recipe is None:
        return
    twins = dict(lb.quantized_layers(nnx.eval_shape(lambda m: lb.quantize_model(m, recipe), model)))
    binary_inputs = {path for path, twin in twins.items() if twin.scheme.input is not None}
    everywhere = 4  # both networks have four layers
    if row.name.startswith("xnor"):
        assert set(twins) == {"layers/1/conv", "hidden"}
        assert binary_inputs == (set(twins) if row.name == "xnor" else set())
    else:
        assert len(twins) == everywhere
        first = {"layers/0"}
        assert binary_inputs == (set(twins) - first if row.name == "bnn" else set())
    # ReLU would leave one sign only.
    assert (row.model.activation == "hard_tanh") == bool(binary_inputs)


def test_flags_choose_and_change_rows():
    rows = mnist.chosen(["twn", "bnn"], epochs=3, convolution="xla")
    assert [row.name for row in rows] == ["twn", "bnn"]
    assert {row.training.epochs for row in rows} == {3}
    assert rows[0].model.convolution == "xla"
    assert mnist.chosen([], epochs=0, convolution="patches") == list(ROWS.values())
    with pytest.raises(ValueError, match=r"\['lenet'\] are no rows; those are \['mlp-float'"):
        mnist.chosen(["lenet"], epochs=0, convolution="patches")


def test_a_smoke_run_is_an_epoch_of_a_few_hundred_images():
    data = mnist.few(ImageData(split(600, 0), split(300, 1), classes=2))
    assert (len(data.train), len(data.test)) == (512, 256)
    for row in map(mnist.smoke, ROWS.values()):
        left = len(data.train) - row.training.validation
        assert row.training.epochs == 1
        assert left >= row.training.batch


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.figure is not None])
def test_a_row_reaches_its_papers_figure(name, assets, tmp_path):
    """Half an hour on two cores for each row."""
    data = load_images(str(assets / "mnist" / "mnist.npz"))
    mnist.table([ROWS[name]], data, tmp_path, [0, 1, 2])
    (result,) = json.loads((tmp_path / "mnist.json").read_text())
    assert result["reached"], result
