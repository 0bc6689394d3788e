"""Fields of a foreign configuration, taken with their type checked."""

import sys
from collections.abc import Mapping
from typing import Any, Final, NoReturn

_REQUIRED: Final = object()


class Fields:
    """Named values of a file: JSON's, or GGUF's metadata.

    A field that is null counts as absent; so does one that a file leaves out.
    """

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = ""):
        """Fields `prefix` + name of `values`; `where` is the file, for messages."""
        self.values, self.where, self.prefix = values, where, prefix

    def has(self, name: str) -> bool:
        """Whether there is such a field."""
        return self.values.get(self.prefix + name) is not None

    def integer(self, name: str, default: Any = _REQUIRED) -> Any:
        """An int in [1, 2**53). Raises: ValueError: Something else, or absent without a default."""
        value = self._get(name, default)
        # Larger ones are no sizes, and floats do not hold them.
        if value is not default and (type(value) is not int or not 1 <= value < 2**53):
            self._wrong(name, value, "an integer in [1, 2**53)")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        """A finite number, as a float. Raises: as `integer`."""
        value = self._get(name, default)
        if value is default:
            return value
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            self._wrong(name, value, "a finite number")
        return float(value)

    def flag(self, name: str, default: Any = _REQUIRED) -> Any:
        """A bool. Raises: as `integer`."""
        value = self._get(name, default)
        if value is not default and type(value) is not bool:
            self._wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: Any = _REQUIRED) -> Any:
        """A string. Raises: as `integer`."""
        value = self._get(name, default)
        if value is not default and type(value) is not str:
            self._wrong(name, value, "a string")
        return value

    def inner(self, name: str) -> "Fields":
        """The fields of an object; none if it is absent. Raises: ValueError: It is no object."""
        value = self._get(name, {})
        if not isinstance(value, Mapping):
            self._wrong(name, value, "an object")
        return Fields(value, f"{self.where}, {self.prefix}{name}")

    def unsupported(self, name: str, reason: str) -> NoReturn:
        """Raises NotImplementedError for the field's value."""
        value = _short(self.values.get(self.prefix + name))
        raise NotImplementedError(
            f"{self.where}: {self.prefix}{name} is {value}, which is not supported: {reason}."
        )

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(self.prefix + name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ValueError(f"{self.where}: {self.prefix}{name} is missing.")
        return default

    def _wrong(self, name: str, value: Any, wanted: str) -> NoReturn:
        raise ValueError(f"{self.where}: {self.prefix}{name} is {_short(value)}, and not {wanted}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
