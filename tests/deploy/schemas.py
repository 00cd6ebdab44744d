"""Schemas of custom resources, made as strict as the API server is with `--validate=strict`."""

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

Tree = dict[str, Any]

ROOT: Final = Path(__file__).parents[2]
FOLDER: Final = Path(os.environ.get("VAE_CRD_DIR", ROOT / "../shared/crds"))
"""Custom resource definitions as their projects publish them, a file each."""


def schemas(folder: Path = FOLDER) -> dict[tuple[str, str], Tree]:
    """Return the schema of each version and kind that a folder defines."""
    found: dict[tuple[str, str], Tree] = {}
    for path in sorted(folder.glob("*.yaml")):
        for document in yaml.load_all(path.read_text(), Loader=yaml.CSafeLoader):
            if document and document.get("kind") == "CustomResourceDefinition":
                spec = document["spec"]
                for version in spec["versions"]:
                    key = f"{spec['group']}/{version['name']}", spec["names"]["kind"]
                    found[key] = version["schema"]["openAPIV3Schema"]
    return found


def strict(schema: Tree) -> Tree:
    """Return a structural schema as JSON Schema that knows no unknown fields."""
    result = {key: _strict(key, value) for key, value in schema.items()}
    if result.get("x-kubernetes-int-or-string"):
        result.pop("anyOf", None)
        result["type"] = ["integer", "string"]
    if result.get("nullable") and isinstance(result.get("type"), str):
        result["type"] = [result["type"], "null"]
    if "properties" in result and not result.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result


def _strict(key: str, value: Any) -> Any:  # noqa: ANN401 - whatever a schema holds
    if key == "properties":
        return {name: strict(part) for name, part in value.items()}
    if key in {"allOf", "anyOf", "oneOf"}:  # conditions on fields that are declared elsewhere
        return value
    if key in {"items", "additionalProperties"} and isinstance(value, dict):
        return strict(value)
    return value


def admitted(schema: Tree, value: Tree) -> Tree:
    """Return a document as the API server validates it: without nulls that may not be, with defaults."""
    result = copy.deepcopy(value)
    _admit(schema, result)
    return result


def _admit(schema: Tree, value: Any) -> None:  # noqa: ANN401 - any part of a document
    if isinstance(value, list):
        for item in value:
            _admit(schema.get("items", {}), item)
    if not isinstance(value, dict):
        return
    properties = schema.get("properties", {})
    for name in list(value):
        part = properties.get(name) or schema.get("additionalProperties")
        if not isinstance(part, dict):
            continue
        if value[name] is None and not part.get("nullable"):
            del value[name]
        else:
            _admit(part, value[name])
    for name, part in properties.items():
        if name not in value and "default" in part:
            value[name] = copy.deepcopy(part["default"])


def faults(schema: Tree, document: Tree) -> Iterator[str]:
    """Yield what the API server would refuse in a document."""
    from jsonschema import Draft202012Validator  # noqa: PLC0415 - slow to import

    whole = strict(schema)
    whole["properties"]["metadata"] = {"type": "object"}
    for error in Draft202012Validator(whole).iter_errors(admitted(schema, document)):
        yield f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}"
