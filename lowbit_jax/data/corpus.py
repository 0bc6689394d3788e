"""A corpus: documents in two splits, the string between them, and a fingerprint of all of it.

A document goes to training or validation by a hash of its unit's name (a file's relative name, a
place in a file, a row's number), never by a random draw or by its position in a list: the split is
the same on every machine, and adding a file moves no other file. What one run trained on and
another evaluates is the same text when their fingerprints are equal.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

Split = Literal["train", "valid"]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text in two splits.

    Always: both have documents, and in tokens `separator` follows every document, also the last.

    name: The source it was loaded from, such as "stdlib" or "text:books/*.txt".
    train, valid: Documents in a fixed order. A sequence, not always a tuple: a dataset on disk
        stays there.
    separator: The string between documents.
    sha256: Fingerprint over names, texts, split and separator: equal fingerprints, equal tokens.
    skipped: Names of files that were left out because they are not UTF-8 (`stdlib` only; elsewhere
        that is an error).
    """

    name: str
    train: Sequence[str]
    valid: Sequence[str]
    separator: str
    sha256: str
    skipped: tuple[str, ...] = ()

    def documents(self, split: Split) -> Sequence[str]:
        """The documents of one split. Raises: ValueError: It is not "train" or "valid"."""
        if split not in ("train", "valid"):
            raise ValueError(f"unknown split {split!r}: a corpus has 'train' and 'valid'.")
        return self.train if split == "train" else self.valid

    def texts(self, split: Split) -> Iterator[str]:
        """Each document with the separator after it: together, the text that is tokenized."""
        return (document + self.separator for document in self.documents(split))

    def byte_count(self, split: Split) -> int:
        """UTF-8 bytes of a split's text, separators included."""
        return sum(len(text.encode()) for text in self.texts(split))

    def summary(self) -> dict[str, Any]:
        """What a run records about its data: plain JSON values, sizes in UTF-8 bytes."""
        return {
            "source": self.name,
            "separator": self.separator,
            "sha256": self.sha256,
            "documents": {"train": len(self.train), "valid": len(self.valid)},
            "bytes": {"train": self.byte_count("train"), "valid": self.byte_count("valid")},
            "skipped": list(self.skipped),
        }

    def __str__(self) -> str:
        labels: dict[Split, str] = {"train": "training", "valid": "validation"}
        sizes = [
            f"{len(self.documents(split)):,} {label} documents ({self.byte_count(split):,} bytes)"
            for split, label in labels.items()
        ]
        skipped = f", skipped (not UTF-8): {', '.join(self.skipped)}" if self.skipped else ""
        return f"{self.name}: {' and '.join(sizes)}, sha256 {self.sha256}{skipped}"


def choose_valid(units: Sequence[str], valid_fraction: float, *, source: str) -> list[bool]:
    """Says for each unit whether it is for validation: its name's hash is below `valid_fraction`.

    Equal names are one unit. When chance would leave a side empty, the unit with the lowest hash is
    for validation, or the one with the highest for training, so that two units are always enough.

    Args:
        units: Names, in any order; the answer for a name does not depend on the others but for the
            rule above.
        valid_fraction: Expected share of the units, in (0, 1).
        source: Named in the error.
    Raises: ValueError: Fewer than two different units.
    """
    names = sorted(set(units))
    if len(names) < 2:
        raise ValueError(
            f"{source}: the corpus has {len(names)} separate piece(s) of text, and a training and "
            "a validation split need at least 2. Give more files or more text, or the separator "
            "that stands between documents."
        )
    place = {name: _hash_fraction(name) for name in names}
    ordered = sorted(names, key=place.__getitem__)
    valid = {name for name in names if place[name] < valid_fraction} or {ordered[0]}
    if len(valid) == len(names):
        valid.discard(ordered[-1])
    return [unit in valid for unit in units]


def fingerprint(records: Iterable[tuple[Split, str, str]], separator: str) -> str:
    """SHA-256 (hex) over (split, name, text) records in order, and the separator.

    Every part is preceded by its length, so that moving a letter from a name into a text changes
    the result.
    """
    digest = hashlib.sha256()
    for part in itertools.chain([separator], itertools.chain.from_iterable(records)):
        data = _encode(part)
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _hash_fraction(name: str) -> float:
    """A number in [0, 1) that the name decides: the first 8 bytes of its SHA-256, over 2**64."""
    return int.from_bytes(hashlib.sha256(_encode(name)).digest()[:8], "big") / 2**64


def _encode(name: str) -> bytes:
    # File names need not be UTF-8; Python carries their odd bytes as surrogates.
    return name.encode(errors="surrogateescape")
