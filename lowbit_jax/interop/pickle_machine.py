"""Runs the pickles that torch writes, without what makes pickles dangerous.

A pickle is a program for a stack machine, and some of its instructions import and call what they
like. Here is a machine that has the others, and for those a table of what a state dict is made of:
a dict, and a tensor that is a part of a storage. Nothing is imported or called, whatever a file
says; an instruction or a name that is not needed is an error.
"""

import collections
import dataclasses
import math
import pickletools
from typing import Any, BinaryIO, Final, NoReturn

import numpy as np

_MARK: Final = object()
_STORAGES: Final = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


@dataclasses.dataclass(frozen=True)
class _Name:
    """What a pickle calls `module.name`."""

    name: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """Elements of one type under a key; they may come later in the file."""

    key: str
    dtype: np.dtype
    length: int


@dataclasses.dataclass(frozen=True)
class View:
    """A tensor: a part of a storage, contiguous."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]


class Machine:
    """Runs one pickle, from where `stream` stands to behind its end.

    storages: Those that its tensors refer to, by key.
    """

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def run(self) -> Any:
        """The pickled object, with a `View` in place of each tensor.

        Raises:
            ValueError: The pickle is damaged, or would call or import anything.
            NotImplementedError: A tensor that is not contiguous, or of a type that is not read.
        """
        try:
            for operation, argument, _ in pickletools.genops(self.stream):
                if operation.name == "STOP":
                    return self._pop()
                self._step(operation.name, argument)
        except ValueError as error:
            raise ValueError(f"no sound pickle of tensors: {error}.") from None
        raise AssertionError("genops ends at STOP or raises")

    def _step(self, name: str, argument: Any) -> None:
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.stack.append(_MARK)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self.stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                self.stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINSTRING" | "SHORT_BINSTRING":
                self.stack.append(argument)
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                self.stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list}.get(name, tuple)())
            case "TUPLE":
                self.stack.append(tuple(self._marked()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.stack.append(tuple([self._pop() for _ in range(int(name[-1]))][::-1]))
            case "APPEND" | "APPENDS":
                items = self._marked() if name == "APPENDS" else [self._pop()]
                self._top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._marked() if name == "SETITEMS" else [self._pop(), self._pop()][::-1]
                self._set_items(items)
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self._top(object)
            case "MEMOIZE":
                self.memo[len(self.memo)] = self._top(object)
            case "BINGET" | "LONG_BINGET":
                if argument not in self.memo:
                    _refuse(f"nothing was kept under {argument}")
                self.stack.append(self.memo[argument])
            case "GLOBAL":
                self.stack.append(_Name(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                last, first = self._pop(), self._pop()
                if not (isinstance(first, str) and isinstance(last, str)):
                    _refuse("a name that is not made of two strings")
                self.stack.append(_Name(f"{first}.{last}"))
            case "BINPERSID":
                self.stack.append(self._storage(self._pop()))
            case "REDUCE":
                arguments = self._pop()
                self.stack.append(_made(self._pop(), arguments))
            case "BUILD":
                # Attributes of the dict, such as the versions of its modules: no tensors.
                self._pop()
            case _:
                _refuse(f"the instruction {name} is none that tensors need")

    def _pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            _refuse("the stack is empty")
        return self.stack.pop()

    def _marked(self) -> list[Any]:
        """What stands above the last mark."""
        above: collections.deque[Any] = collections.deque()
        while self.stack and self.stack[-1] is not _MARK:
            above.appendleft(self.stack.pop())
        if not self.stack:
            _refuse("a mark is missing")
        self.stack.pop()
        return list(above)

    def _top(self, kind: type) -> Any:
        if not self.stack or self.stack[-1] is _MARK or not isinstance(self.stack[-1], kind):
            _refuse(f"the stack's top is no {kind.__name__}")
        return self.stack[-1]

    def _set_items(self, items: list[Any]) -> None:
        keys, values = items[::2], items[1::2]
        if len(keys) != len(values) or not all(isinstance(key, str | int) for key in keys):
            _refuse("the keys of a dict are not names or numbers")
        self._top(dict).update(zip(keys, values, strict=True))

    def _storage(self, described: Any) -> Storage:
        match described:
            case ("storage", _Name(name), str(key), str(), int(length), *rest) if length >= 0:
                pass
            case _:
                _refuse("a reference to outside that is not a storage")
        kind = name.removeprefix("torch.")
        if kind not in _STORAGES or any(item is not None for item in rest):
            raise NotImplementedError(f"a storage {name}, or a part of one, is not read here.")
        storage = Storage(key, np.dtype(_STORAGES[kind]), length)
        if self.storages.setdefault(key, storage) != storage:
            _refuse(f"storage {key} is described in two ways")
        return storage


def _made(function: Any, arguments: Any) -> Any:
    """In place of a call: the two things that a state dict is made of."""
    match function, arguments:
        case _Name("collections.OrderedDict"), ():
            return {}
        case (
            _Name("torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor"),
            (Storage() as storage, int(offset), tuple(shape), tuple(strides), *_),
        ):
            return _view(storage, offset, shape, strides)
        case _Name("torch._utils._rebuild_parameter"), (View() as view, *_):
            return view
    name = function.name if isinstance(function, _Name) else type(function).__name__
    _refuse(f"it would call {name!r}, and nothing is called here")


def _view(storage: Storage, offset: int, shape: tuple, strides: tuple) -> View:
    if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in (*shape, *strides)):
        _refuse("a tensor's shape and strides do not belong together")
    if not (offset >= 0 and offset + math.prod(shape) <= storage.length):
        _refuse(f"a tensor of shape {shape} reaches beyond its storage of {storage.length}")
    expected = 1
    for length, stride in zip(shape[::-1], strides[::-1], strict=True):
        if length > 1 and stride != expected:
            raise NotImplementedError(f"a tensor of shape {shape} is not contiguous: {strides}.")
        expected *= length
    return View(storage, offset, shape)


def _refuse(reason: str) -> NoReturn:
    raise ValueError(reason)
