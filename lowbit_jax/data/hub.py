"""Hugging Face datasets as a corpus: from the hub by name, or from a folder without a network.

Imports `datasets`, which takes seconds: `sources.load_corpus` imports this module only for `hf:`
sources.
"""

import pathlib
from collections.abc import Iterator, Mapping, Sequence

import datasets

from lowbit_jax.data.corpus import Corpus, Split, choose_valid, fingerprint

_VALID_NAMES = ("validation", "valid", "val", "dev")
_SAVED_FILES = ("dataset_dict.json", "state.json")  # what save_to_disk leaves in a folder
_OFFLINE = "hf:FOLDER (save_to_disk or parquet files)"


def load_hub_corpus(where: str, *, separator: str, valid_fraction: float) -> Corpus:
    """Loads `NAME[:CONFIG]`: one document per row, blank rows left out, texts read when needed.

    NAME is a folder that `save_to_disk` wrote, any other folder that `datasets.load_dataset` reads
    (parquet, JSON lines), or a dataset of the hub. Splits "train" and "validation" are used where
    the dataset has them; otherwise "train", or the only split, is divided by a hash of the row's
    number.

    Raises:
        ValueError: No such configuration, no clear text column, no training split, or too few rows.
        OSError: No such dataset or folder (FileNotFoundError), or no network (ConnectionError).
    """
    source = f"hf:{where}"
    splits = load_splits(where, source, offline=f"{_OFFLINE}, text:GLOB or stdlib")
    train = _training_split(splits, source)
    column = _text_column(train, source)
    valid_name = next((name for name in _VALID_NAMES if name in splits), None)
    if valid_name is not None:
        valid = splits[valid_name]
        if column not in valid.column_names:
            raise ValueError(
                f"{source}: the text column {column!r} of 'train' is missing in {valid_name!r}, "
                f"which has {valid.column_names}."
            )
        train_rows, valid_rows = _text_rows(train, column), _text_rows(valid, column)
    else:
        rows = _text_rows(train, column)
        chosen = choose_valid([str(row) for row in rows], valid_fraction, source=source)
        train_rows = [row for row, is_valid in zip(rows, chosen, strict=True) if not is_valid]
        valid_rows = [row for row, is_valid in zip(rows, chosen, strict=True) if is_valid]
        valid = train
    if not train_rows or not valid_rows:
        raise ValueError(
            f"{source}: {len(train_rows)} training and {len(valid_rows)} validation rows with text "
            f"in column {column!r}; both are needed."
        )
    texts: dict[Split, Sequence[str]] = {
        "train": _select(train, train_rows)[column],
        "valid": _select(valid, valid_rows)[column],
    }
    return Corpus(
        name=source,
        train=texts["train"],
        valid=texts["valid"],
        separator=separator,
        sha256=fingerprint(_records(texts), separator),
    )


def load_splits(where: str, source: str, *, offline: str = _OFFLINE) -> dict[str, datasets.Dataset]:
    """The splits of a saved folder, another folder or a dataset of the hub, by name.

    Args:
        where: `NAME[:CONFIG]`; see `load_hub_corpus`.
        source: What messages call it.
        offline: What a message suggests to use without a network.

    Raises:
        ValueError: No such configuration.
        OSError: No such dataset or folder (FileNotFoundError), or no network (ConnectionError).
    """
    is_folder = pathlib.Path(where).expanduser().is_dir()
    name, _, config = (where, "", "") if is_folder else where.partition(":")
    folder = pathlib.Path(name).expanduser()
    if not folder.is_dir() and name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{source}: no folder {folder}.")
    try:
        if any((folder / file).is_file() for file in _SAVED_FILES):
            found = datasets.load_from_disk(str(folder))
        else:
            found = datasets.load_dataset(str(folder) if folder.is_dir() else name, config or None)
    except ConnectionError as error:
        raise ConnectionError(
            f"{source}: the Hugging Face hub cannot be reached ({error}), and there is no folder "
            f"{name!r} here. Without a network use {offline}."
        ) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{source}: {error}") from error
    except ValueError as error:  # an unknown configuration: the message lists the known ones
        raise ValueError(f"{source}: {error}") from error
    if isinstance(found, Mapping):
        return {str(split): data for split, data in found.items()}
    return {"train": found}


def _training_split(splits: Mapping[str, datasets.Dataset], source: str) -> datasets.Dataset:
    if "train" in splits:
        return splits["train"]
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise ValueError(f"{source}: none of the splits {sorted(splits)} is 'train'.")


def _text_column(data: datasets.Dataset, source: str) -> str:
    """The column of strings named "text", or else the only one."""
    strings = [
        name
        for name, feature in data.features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    columns = {name: str(feature) for name, feature in data.features.items()}
    raise ValueError(
        f"{source}: which column is the text? None is a string column named 'text', and "
        f"{len(strings)} of the columns hold strings: {columns}. Rename the one you mean to 'text' "
        "and save the dataset to a folder."
    )


def _text_rows(data: datasets.Dataset, column: str) -> list[int]:
    """Numbers of the rows that hold text: empty lines and missing values separate nothing."""
    return [row for row, text in enumerate(data[column]) if text and not text.isspace()]


def _select(data: datasets.Dataset, rows: Sequence[int]) -> datasets.Dataset:
    # A selection reads through an index; the whole dataset, which is the usual case, does not.
    return data if len(rows) == len(data) else data.select(rows)


def _records(texts: Mapping[Split, Sequence[str]]) -> Iterator[tuple[Split, str, str]]:
    for split, documents in texts.items():
        for row, text in enumerate(documents):
            yield split, str(row), text
