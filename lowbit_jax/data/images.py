"""Labelled images: an npz file, or a dataset of Hugging Face with images and class labels.

- `PATH.npz`: uint8 `x_train` and `x_test` [n, height, width] or [n, height, width, channels], and
  integer labels `y_train` and `y_test` [n].
- `hf:NAME[:CONFIG]`: splits "train" and "test", a column of images and one of class labels; NAME
  as for text (see `hub`), such as `hf:ylecun/mnist` or `hf:FOLDER`.
"""

import dataclasses
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

_KEYS = ("x_train", "y_train", "x_test", "y_test")


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """One split: images and the class of each.

    Always: as many labels as images, at least one, and labels are 0 or more.

    Attributes:
        images: uint8, channels last.
        labels: Classes, counted from 0.
    """

    images: UInt8[np.ndarray, "n height width channels"]
    labels: Int32[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice) -> "LabelledImages":
        return LabelledImages(self.images[rows], self.labels[rows])


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A dataset with its own test set.

    Always: both splits have images of one shape, and no class is met for the first time in a test.

    Attributes:
        train: What may be looked at.
        test: What is measured at the end.
        classes: One more than the largest label.
    """

    train: LabelledImages
    test: LabelledImages
    classes: int


def load_images(source: str) -> ImageData:
    """Loads `PATH.npz` or `hf:NAME[:CONFIG]`.

    Raises:
        ValueError: A file or dataset that is not what the module's description says; the message
            has what was found.
        OSError: No such file or dataset, or no network.
    """
    arrays = _from_hub(source) if source.startswith("hf:") else _from_npz(source)
    splits = {
        split: _checked(source, split, arrays[f"x_{split}"], arrays[f"y_{split}"])
        for split in ("train", "test")
    }
    train, test = splits["train"], splits["test"]
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(
            f"{source}: images for training are {train.images.shape[1:]} and those for the test "
            f"{test.images.shape[1:]} (height, width, channels): they must be alike."
        )
    classes = int(train.labels.max()) + 1
    if (largest := int(test.labels.max())) >= classes:
        raise ValueError(
            f"{source}: the test has class {largest}, and training only 0 to {classes - 1}."
        )
    return ImageData(train, test, classes)


def _from_npz(source: str) -> Mapping[str, np.ndarray]:
    path = pathlib.Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{source}: no such file. Give PATH.npz or hf:NAME.")
    try:
        # Object arrays would run code of the file's author; they are refused.
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in _KEYS if key not in file.files]
            if missing:
                raise ValueError(f"it lacks {missing}; it has {file.files}")
            return {key: file[key] for key in _KEYS}
    except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{source}: is no npz file with the arrays {list(_KEYS)}: {error}."
        ) from error


def _from_hub(source: str) -> Mapping[str, np.ndarray]:
    # `datasets` takes seconds to import.
    from lowbit_jax.data import hub

    splits = hub.load_splits(source.removeprefix("hf:"), source)
    if missing := [name for name in ("train", "test") if name not in splits]:
        raise ValueError(f"{source}: it lacks the splits {missing}; it has {sorted(splits)}.")
    arrays: dict[str, np.ndarray] = {}
    for split in ("train", "test"):
        data = splits[split]
        image = _column(source, split, data.features, ("image", "img"))
        label = _column(source, split, data.features, ("label", "labels"))
        pictures = [np.asarray(picture) for picture in data[image]]
        if len(shapes := {picture.shape for picture in pictures}) != 1:
            raise ValueError(
                f"{source}: {split} has images of {len(shapes)} shapes, {sorted(shapes)[:3]}: "
                "they must be alike, and at least one."
            )
        arrays[f"x_{split}"] = np.stack(pictures)
        arrays[f"y_{split}"] = np.asarray(data[label])
    return arrays


def _column(source: str, split: str, features: Mapping[str, Any], names: tuple[str, ...]) -> str:
    for name in names:
        if name in features:
            return name
    raise ValueError(
        f"{source}: {split} has no column {' or '.join(map(repr, names))}; it has "
        f"{sorted(features)}."
    )


def _checked(source: str, split: str, images: np.ndarray, labels: np.ndarray) -> LabelledImages:
    """The split, with channels. Raises ValueError for anything that `LabelledImages` excludes."""
    what = f"{source}: {split}"
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape:
        raise ValueError(
            f"{what} images are {images.dtype} {images.shape}, not uint8 [n, height, width] or "
            "[n, height, width, channels] of at least one image."
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{what} labels are {labels.dtype} {labels.shape}, not one integer for each of "
            f"{len(images)} images."
        )
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest > np.iinfo(np.int32).max:
        raise ValueError(f"{what} labels are in [{lowest}, {highest}], not 0 or more.")
    images = images[..., None] if images.ndim == 3 else images
    return LabelledImages(images, labels.astype(np.int32))
