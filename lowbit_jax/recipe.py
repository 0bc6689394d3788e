"""Which layer is quantized how: Rule (a pattern of paths and a scheme) and Recipe (rules in order).

As JSON, readable without jax:
{"schema": 1, "rules": [{"path": ..., "scheme": {"weight": {"type": "AbsMean", "spec": {...}}}}]}.
"""

import dataclasses
import json
import re
from typing import Final

from lowbit_jax.presets import presets
from lowbit_jax.scheme import LayerScheme

SCHEMA: Final = 1


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a recipe.

    Attributes:
        path: Regular expression that must match a layer's whole path, such as `layers/\\d+/mlp/.*`.
        scheme: How those layers are quantized; a string names a preset, None leaves them float.
    """

    path: str
    scheme: LayerScheme | str | None

    def __post_init__(self):
        try:
            re.compile(self.path)
        except re.error as error:
            raise ValueError(f"Rule: {self.path!r} is no regular expression: {error}.") from None
        if not (self.scheme is None or isinstance(self.scheme, str | LayerScheme)):
            raise ValueError(
                f"Rule({self.path!r}): the scheme {self.scheme!r} is neither a LayerScheme, a "
                "preset's name nor None."
            )
        if isinstance(self.scheme, str):
            object.__setattr__(self, "scheme", presets[self.scheme])

    @property
    def resolved(self) -> LayerScheme | None:
        """The scheme; a preset's name was looked up when the rule was made."""
        assert not isinstance(self.scheme, str)
        return self.scheme

    def matches(self, path: str) -> bool:
        """Whether the pattern matches the whole path."""
        return re.fullmatch(self.path, path) is not None


@dataclasses.dataclass(frozen=True, init=False)
class Recipe:
    """Rules in order; the first that matches a layer decides, and none leaves it float."""

    rules: tuple[Rule, ...]

    def __init__(self, *rules: Rule):
        object.__setattr__(self, "rules", tuple(rules))
        if not rules:
            raise ValueError("Recipe: needs at least one rule; a float model needs no recipe.")

    def find(self, path: str) -> Rule | None:
        """The first rule that matches, if any."""
        return next((rule for rule in self.rules if rule.matches(path)), None)

    def to_json(self) -> str:
        """The recipe as JSON text."""
        rules = [
            {"path": r.path, "scheme": None if r.resolved is None else r.resolved.to_dict()}
            for r in self.rules
        ]
        return json.dumps({"schema": SCHEMA, "rules": rules})

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """The inverse of `to_json`; an unknown schema, key, type or format is refused by name."""
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise ValueError(
                f"Recipe: schema {found!r} is not {SCHEMA}, the one this version reads."
            )
        if set(data) != {"schema", "rules"}:
            raise ValueError(f"Recipe: keys {sorted(data)} are not ['rules', 'schema'].")
        rules = []
        for rule in data["rules"]:
            if not isinstance(rule, dict) or set(rule) != {"path", "scheme"}:
                found = sorted(rule) if isinstance(rule, dict) else rule
                raise ValueError(f"Recipe: a rule has keys {found}, not ['path', 'scheme'].")
            scheme = rule["scheme"]
            if isinstance(scheme, dict):
                scheme = LayerScheme.from_dict(scheme)
            rules.append(Rule(rule["path"], scheme))
        return cls(*rules)

    @classmethod
    def from_string(cls, text: str) -> "Recipe | str | None":
        """A recipe from a command line: a preset's name, `pattern=preset;...`, JSON, or "" for
        float.

        A preset's name stays a string, since it means every layer but embedding and head; `none` as
        a preset leaves the layers of that pattern float.

        Raises:
            ValueError: An unknown preset (the message lists the nearest), a bad pattern or JSON.
        """
        text = text.strip()
        if not text:
            return None
        if text.startswith("{"):
            return cls.from_json(text)
        if "=" not in text:
            presets[text]  # raises for an unknown name
            return text
        rules = []
        for part in filter(None, map(str.strip, text.split(";"))):
            path, separator, name = part.rpartition("=")
            if not separator or not path:
                raise ValueError(f"Recipe: {part!r} is not of the form pattern=preset.")
            rules.append(Rule(path.strip(), None if name.strip() == "none" else name.strip()))
        return cls(*rules)
