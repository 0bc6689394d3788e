"""Labelled images from files as they are on disk, and what is said of those that are none."""

import datasets
import numpy as np
import pytest

from lowbit_jax.data.images import load_images

RNG = np.random.default_rng(0)
ARRAYS = {
    "x_train": RNG.integers(0, 256, (6, 3, 2), np.uint8),
    "y_train": np.uint8([0, 1, 2, 0, 1, 2]),
    "x_test": RNG.integers(0, 256, (4, 3, 2), np.uint8),
    "y_test": np.int64([2, 1, 0, 2]),
}


def saved(folder, **changes):
    path = folder / "images.npz"
    arrays = {name: value for name, value in (ARRAYS | changes).items() if value is not None}
    np.savez(path, **arrays)
    return str(path)


def check(data, test_shape=(4, 3, 2, 1)):
    assert data.classes == 3
    assert data.test.images.shape == test_shape
    np.testing.assert_array_equal(data.train.images[..., 0], ARRAYS["x_train"])
    np.testing.assert_array_equal(data.test.images[..., 0], ARRAYS["x_test"])
    np.testing.assert_array_equal(data.train.labels, ARRAYS["y_train"])
    np.testing.assert_array_equal(data.test.labels, ARRAYS["y_test"])
    assert data.train.labels.dtype == np.int32


def test_grey_images_of_an_npz_get_a_channel(tmp_path):
    check(load_images(saved(tmp_path)))


def test_a_slice_keeps_images_and_labels_together(tmp_path):
    part = load_images(saved(tmp_path)).train[1:3]
    assert len(part) == 2
    np.testing.assert_array_equal(part.images[..., 0], ARRAYS["x_train"][1:3])
    np.testing.assert_array_equal(part.labels, ARRAYS["y_train"][1:3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, r"lacks \['y_test'\]; it has \['x_train', 'y_train', 'x_test'\]"),
        ({"x_train": np.array([None])}, r"no npz file with the arrays .*allow_pickle"),
        ({"x_train": np.zeros((6, 3, 2), np.float32)}, r"train images are float32 \(6, 3, 2\)"),
        ({"x_train": np.zeros((6, 3), np.uint8)}, r"train images are uint8 \(6, 3\), not"),
        (
            {"x_test": np.zeros((0, 3, 2), np.uint8), "y_test": np.zeros(0, np.int32)},
            r"of at least one image",
        ),
        ({"x_test": np.zeros((4, 2, 2), np.uint8)}, r"training are \(3, 2, 1\).*test \(2, 2, 1\)"),
        ({"y_train": np.zeros(6)}, r"train labels are float64 \(6,\), not one integer for each"),
        ({"y_test": np.zeros(5, np.int32)}, r"test labels are int32 \(5,\).*each of 4 images"),
        ({"y_test": np.int8([0, -1, 0, 0])}, r"test labels are in \[-1, 0\]"),
        ({"y_test": np.int8([0, 1, 2, 3])}, r"the test has class 3, and training only 0 to 2"),
    ],
)
def test_an_npz_with_something_else_is_refused_with_what_it_has(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_images(saved(tmp_path, **changes))


@pytest.mark.parametrize("damage", ["text", "cut", "empty", "array"])
def test_a_file_that_is_no_npz_is_named(tmp_path, damage):
    path = tmp_path / "images.npz"
    if damage == "cut":
        saved(tmp_path)
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "array":
        with path.open("wb") as file:
            np.save(file, ARRAYS["x_train"])
    else:
        path.write_text("not an archive" if damage == "text" else "")
    with pytest.raises(ValueError, match=r"images\.npz: is no npz file with the arrays"):
        load_images(str(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.npz: no such file"):
        load_images(str(tmp_path / "missing.npz"))


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def split(name, **columns):
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b", "c"])
    )
    rows = {"image": list(ARRAYS[f"x_{name}"]), "label": ARRAYS[f"y_{name}"].tolist()} | columns
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.usefixtures("own_cache")
def test_a_dataset_of_hugging_face_holds_the_same(tmp_path):
    splits = datasets.DatasetDict(train=split("train"), test=split("test"))
    splits.save_to_disk(tmp_path / "saved")
    check(load_images(f"hf:{tmp_path}/saved"))


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": split("train")}, r"lacks the splits \['test'\]; it has \['train'\]"),
        (
            {"train": split("train"), "test": split("test").rename_column("image", "text")},
            r"test has no column 'image' or 'img'; it has \['label', 'text'\]",
        ),
        (
            {
                "train": split("train"),
                "test": split("test", image=[*ARRAYS["x_test"][1:], np.zeros((5, 5), np.uint8)]),
            },
            r"test has images of 2 shapes, \[\(3, 2\), \(5, 5\)\]",
        ),
    ],
    ids=["no test", "no images", "two shapes"],
)
def test_a_dataset_with_something_else_is_refused_with_what_it_has(tmp_path, splits, message):
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        load_images(f"hf:{tmp_path}/saved")


def test_the_real_mnist(assets):
    data = load_images(str(assets / "mnist" / "mnist.npz"))
    assert data.train.images.shape == (60_000, 28, 28, 1)
    assert (len(data.test), data.classes) == (10_000, 10)
    # Of the test set as it was published: how often each digit occurs.
    assert np.bincount(data.test.labels).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip
