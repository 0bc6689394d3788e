"""Where text comes from: this Python's standard library, files, Hugging Face datasets.

A source cuts its text into pieces, and a hash of each piece's unit decides its split (see
`corpus`):

- `stdlib`: a unit is a file, a document is a file.
- `text:GLOB`: a file is cut into documents where the separator occurs. The unit is the file where
  there are enough of them for `valid_fraction` (20 at 5 %). With fewer, it is a place in the file:
  all documents that begin in the same 4,096 characters (fewer in a small corpus) stay together, so
  that validation text is read in context too. A file without the separator is then cut at line
  ends, and blocks that stay neighbours stay one document.
- `hf:NAME[:CONFIG]`: a unit is a row, unless the dataset brings its own validation split. See
  `hub`.
"""

import dataclasses
import glob
import itertools
import os
import pathlib
import sysconfig
from collections.abc import Iterator, Sequence

from lowbit_jax.data.corpus import Corpus, Split, choose_valid, fingerprint

_EXCLUDED_FOLDERS = frozenset(
    [
        *("test", "tests", "idle_test"),  # odd text, some of it broken on purpose
        "idlelib",  # missing on some systems
        *("site-packages", "dist-packages"),  # not the standard library
        "pydoc_data",  # one generated file; its hash made it 60 % of the validation text
        "__pycache__",
    ]
)
# Written on one machine, by its build or its administrator: no two machines had an equal corpus.
_LOCAL_FOLDER = "config-"
_LOCAL_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")

_BLOCK = 4096  # characters of a file that share a side of the split
_MIN_VALID_BLOCKS = 4  # what a small corpus's validation split should consist of


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of text that goes to one side of the split.

    unit: The name whose hash decides the side.
    text: Never blank, unless it continues another piece.
    continues: It follows the piece before it directly: where both are on one side they are one
        document.
    """

    unit: str
    text: str
    continues: bool = False


def load_corpus(source: str, *, separator: str = "\n\n", valid_fraction: float = 0.05) -> Corpus:
    """Loads text and splits it into training and validation documents, deterministically.

    Args:
        source: "stdlib", "text:GLOB" (`**` crosses folders, `~` is home) or "hf:NAME[:CONFIG]",
            where NAME is a dataset of the hub, a folder that `save_to_disk` wrote, or a folder of
            parquet files.
        separator: The string between documents; for "text" it is also where files are cut. Not
            empty.
        valid_fraction: Expected share of the text that is for validation, in (0, 1).
    Raises:
        ValueError: An unknown source, a separator or fraction out of range, text that is not UTF-8,
            or a corpus that is too small to be split.
        OSError: Nothing was found (FileNotFoundError), or the hub cannot be reached
            (ConnectionError).
    """
    if not separator:
        raise ValueError("separator is empty: without one, documents cannot be told apart.")
    if not 0 < valid_fraction < 1:
        raise ValueError(f"valid_fraction is {valid_fraction}; it must lie between 0 and 1.")
    kind, _, where = source.partition(":")
    if source == "stdlib":
        pieces, skipped = stdlib_pieces()
        return _split(source, pieces, separator, valid_fraction, skipped)
    if kind == "text" and where:
        pieces = text_pieces(where, separator, valid_fraction)
        return _split(source, pieces, separator, valid_fraction)
    if kind == "hf" and where:
        # Importing `datasets` takes seconds, which no other source should pay.
        from lowbit_jax.data.hub import load_hub_corpus

        return load_hub_corpus(where, separator=separator, valid_fraction=valid_fraction)
    raise ValueError(
        f"unknown source {source!r}. Sources: 'stdlib', 'text:GLOB' (text:books/**/*.txt), "
        "'hf:NAME[:CONFIG]' (hf:Salesforce/wikitext:wikitext-2-raw-v1, hf:a/folder)."
    )


def stdlib_pieces() -> tuple[list[Piece], tuple[str, ...]]:
    """The running Python's own library, sorted by name, and the names of files that are not UTF-8.

    Raises: FileNotFoundError: This Python has no readable library (a zipped or stripped one).
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    pieces, skipped = [], []
    for name, path in sorted(_stdlib_files(root)):
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            skipped.append(name)
            continue
        if text.strip():
            pieces.append(Piece(name, text))
    if not pieces:
        raise FileNotFoundError(
            f"stdlib: no .py files in {root}: this Python's library is zipped, stripped of its "
            "sources, or missing. Use another Python, or another source: text:GLOB or hf:NAME."
        )
    return pieces, tuple(skipped)


def text_pieces(pattern: str, separator: str, valid_fraction: float) -> list[Piece]:
    """The pieces of all files that match `pattern`, sorted by name, cut as said at the top.

    Raises:
        FileNotFoundError: No file matches.
        ValueError: A file is not UTF-8.
    """
    pattern = os.path.expanduser(pattern)
    root = _fixed_part(pattern)
    paths = [pathlib.Path(p) for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)]
    files = sorted((pathlib.Path(os.path.relpath(p, root)).as_posix(), p) for p in paths)
    if not files:
        raise FileNotFoundError(
            f"text:{pattern}: no file matches (seen from {os.getcwd()}). `**` crosses folders; "
            "quote the pattern so that the shell leaves it alone."
        )
    texts = [(name, _read(path)) for name, path in files]
    if len(files) * valid_fraction >= 1:
        cut = [(name, _cut(text, separator)) for name, text in texts]
        return [Piece(name, part) for name, parts in cut for _, part in parts if part.strip()]

    characters = sum(len(text) for _, text in texts)
    block = max(1, min(_BLOCK, int(characters * valid_fraction / _MIN_VALID_BLOCKS)))
    pieces = []
    for name, text in texts:
        if separator in text:
            parts = [(start, part) for start, part in _cut(text, separator) if part.strip()]
            pieces += [Piece(f"{name}:{start // block}", part) for start, part in parts]
        elif text.strip():
            blocks = enumerate(_blocks(text, block))
            pieces += [Piece(f"{name}:{i}", part, continues=i > 0) for i, part in blocks]
    return pieces


def _split(
    source: str,
    pieces: Sequence[Piece],
    separator: str,
    valid_fraction: float,
    skipped: tuple[str, ...] = (),
) -> Corpus:
    """Sends every piece to its side and joins those that continue one another."""
    chosen = choose_valid([piece.unit for piece in pieces], valid_fraction, source=source)
    sides: list[Split] = ["valid" if valid else "train" for valid in chosen]
    documents: dict[Split, list[list[str]]] = {"train": [], "valid": []}
    previous = None
    for piece, side in zip(pieces, sides, strict=True):
        if piece.continues and side == previous:
            documents[side][-1].append(piece.text)
        else:
            documents[side].append([piece.text])
        previous = side
    records = ((side, p.unit, p.text) for p, side in zip(pieces, sides, strict=True))
    return Corpus(
        name=source,
        train=tuple("".join(parts) for parts in documents["train"]),
        valid=tuple("".join(parts) for parts in documents["valid"]),
        separator=separator,
        sha256=fingerprint(records, separator),
        skipped=skipped,
    )


def _stdlib_files(root: pathlib.Path) -> Iterator[tuple[str, pathlib.Path]]:
    """(name relative to `root`, with forward slashes, path) of the library's own sources."""
    for folder, folders, files in os.walk(root):
        folders[:] = [
            f for f in folders if f not in _EXCLUDED_FOLDERS and not f.startswith(_LOCAL_FOLDER)
        ]
        for file in files:
            if file.endswith(".py") and not file.startswith(_LOCAL_FILES):
                path = pathlib.Path(folder, file)
                yield path.relative_to(root).as_posix(), path


def _fixed_part(pattern: str) -> str:
    """The folder in front of the first wildcard: names are relative to it, wherever it lies."""
    parts = pathlib.Path(pattern).parts
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), parts))
    return os.path.join("", *(fixed if len(fixed) < len(parts) else fixed[:-1])) or "."


def _read(path: pathlib.Path) -> str:
    """A file's text, line ends as they are."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}). Convert the file, or "
            "choose a pattern that leaves it out."
        ) from error


def _cut(text: str, separator: str) -> Iterator[tuple[int, str]]:
    """(start in characters, part) of what lies between separators."""
    start = 0
    for part in text.split(separator):
        yield start, part
        start += len(part) + len(separator)


def _blocks(text: str, size: int) -> Iterator[str]:
    """Blocks of at most `size` characters: up to a line's end, else to a space, else anywhere."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            # rfind is -1 where there is none, so that +1 makes it falsy.
            end = text.rfind("\n", start, end) + 1 or text.rfind(" ", start, end) + 1 or end
        yield text[start:end]
        start = end
