"""The JSON schema of a sweep file, for editors: every dotted field with its type, range and meaning."""

from collections.abc import Mapping
from typing import Any

from dfkd_ray.config import METHODS, DeepInversionConfig, TrialConfig, field_paths
from dfkd_ray.sweep.search import BOUNDED, FIXED
from dfkd_ray.sweep.sweep_config import SweepConfig

Schema = dict[str, Any]


def json_schema() -> Schema:
    """A schema (JSON Schema 2020-12) of `base`, `grid`, `search`, `exclude`, `seeds`, `stop`, `tiny` and `about`."""
    trial = TrialConfig.model_json_schema()
    definitions = trial.pop("$defs")
    for model in (row.config for row in METHODS.values()):
        if model is not DeepInversionConfig:  # a config without `method` is DeepInversion's
            definitions[model.__name__]["required"] = ["method"]
    # Fields that a trial requires may be in the grid instead of in base.
    base = {name: value for name, value in trial.items() if name != "required"}
    values = {name: value_schema(trial, definitions, name) for name in dict.fromkeys(field_paths(TrialConfig))}
    searched = {n: v for n, v in values.items() if not any((n + ".").startswith(f + ".") for f in FIXED)}
    grid = {**dotted({name: listed(value) for name, value in values.items()}), "minProperties": 1}
    schema = SweepConfig.model_json_schema()
    schema["$defs"] |= definitions
    replaced = {
        "base": base,
        "grid": {"anyOf": [grid, {"type": "array", "items": grid, "minItems": 1}]},
        "exclude": {"type": "array", "items": dotted({n: {"anyOf": [v, listed(v)]} for n, v in values.items()})},
        "tiny": dotted(values),
    }
    for name, own in replaced.items():
        schema["properties"][name] |= {"description": schema["properties"][name].get("description", ""), **own}
        if name == "grid":
            schema["properties"][name].pop("default", None)
    space = dotted({name: domain_schema(value) for name, value in searched.items()})
    schema["$defs"]["SearchConfig"]["properties"]["space"] |= {**space, "minProperties": 1}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "dfkd-ray sweep file"
    schema["oneOf"] = [
        {"required": ["grid"], "properties": {"search": {"type": "null"}}},
        {"required": ["search"], "properties": {"grid": {"type": "null"}}},
    ]
    return schema


def value_schema(trial: Mapping[str, Any], definitions: Mapping[str, Any], name: str) -> Schema:
    """The schema of one dotted field. In a union, the schemas of all members that have the field."""
    nodes: list[Mapping[str, Any]] = [trial]
    for part in name.split("."):
        nodes = [
            member["properties"][part]
            for node in nodes
            for member in members(node, definitions)
            if part in member.get("properties", {})
        ]
    distinct = [dict(node) for position, node in enumerate(nodes) if node not in nodes[:position]]
    return distinct[0] if len(distinct) == 1 else {"anyOf": distinct}


def members(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The object schemas of a node, with references and unions resolved."""
    if "$ref" in node:
        return members(definitions[node["$ref"].rpartition("/")[2]], definitions)
    inner = node.get("oneOf") or node.get("anyOf")
    return [m for option in inner for m in members(option, definitions)] if inner else [node]


def dotted(properties: Mapping[str, Schema]) -> Schema:
    """The schema of an object with these dotted names and no others."""
    return {"type": "object", "properties": dict(properties), "additionalProperties": False}


def listed(value: Schema) -> Schema:
    """The schema of a non-empty list of values."""
    return {"type": "array", "items": value, "minItems": 1}


def domain_schema(value: Schema) -> Schema:
    """The schema of a field's domain: a list, or one of Ray Tune's domain names with its arguments."""
    numbers = {
        name: {
            "type": "array",
            "items": {"type": "integer" if "int" in name else "number"},
            "minItems": count,
            "maxItems": count,
            "description": "[low, high, q]" if count == 3 else "[low, high]",
        }
        for name, count in BOUNDED.items()
    }
    named = {**dotted({"choice": listed(value), **numbers}), "minProperties": 1, "maxProperties": 1}
    return {"anyOf": [listed(value), named]}
