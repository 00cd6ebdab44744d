"""Typed, frozen configuration that rejects unknown keys, and dotted overrides of it.

Shared with training, so that both command lines treat `a.b=value` alike.
"""

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

ConfigT = TypeVar("ConfigT", bound="Config")


class ConfigError(ValueError):
    """A configuration value is unknown or out of range; the text says which and what is allowed."""


class Config(BaseModel):
    """Base of every configuration: immutable, documented field by field, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Return a configuration from plain values.

        Raises:
            ConfigError: If a key is unknown or a value is out of range.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(_explain(error)) from None

    def merge(self, values: Mapping[str, Any]) -> Self:
        """Return a copy with a tree of values laid over it.

        Raises:
            ConfigError: If a key is unknown or a value is refused.
        """
        return type(self).parse(_merged(self.model_dump(), values))

    def override(self, assignments: Iterable[str]) -> Self:
        """Return a copy with dotted assignments such as `batching.max_batch_rows=64` applied.

        Values are read as YAML, so `true`, `3`, `1e-3`, `null` and `[1, 2]` mean what they look like.

        Raises:
            ConfigError: If an assignment has no `=`, names an unknown key, or its value is refused.
        """
        values = self.model_dump()
        for assignment in assignments:
            path, equals, text = assignment.partition("=")
            if not equals:
                raise ConfigError(f"override {assignment!r}: write key=value, such as seed=1")
            _assign(values, path.strip(), _number_or_yaml(text))
        return type(self).parse(values)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _merged(below[key], above[key]) for key in above if isinstance(below.get(key), Mapping)}
    return {**below, **above, **both}


def _assign(values: dict[str, Any], path: str, value: object) -> None:
    *parents, leaf = path.split(".")
    node: Any = values
    for name in parents:
        node = node.get(name) if isinstance(node, dict) else None
    if not isinstance(node, dict) or leaf not in node:
        known = ", ".join(sorted(node)) if isinstance(node, dict) else "none"
        raise ConfigError(f"override {path!r}: no such key; known here: {known}")
    node[leaf] = value


def _number_or_yaml(text: str) -> object:
    if "e" in text.lower():  # YAML 1.1 reads 1e-3 as text
        with contextlib.suppress(ValueError):
            return float(text)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: a date that is none
        raise ConfigError(f"override value {text!r} is not valid YAML") from None


def _explain(error: ValidationError) -> str:
    parts = []
    for item in error.errors(include_url=False, include_context=False):
        where = ".".join(str(part) for part in item["loc"]) or "configuration"
        given = "" if item["type"] in {"missing", "extra_forbidden"} else f" (got {item['input']!r})"
        parts.append(f"{where}: {item['msg']}{given}")
    return "; ".join(parts)
