"""Print docs/configuration.md: every key of config.py with its values, default and meaning.

Run it after every change of a key: python scripts/print_configuration.py >docs/configuration.md
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from config import Config, Section

HEAD = """# Configuration

A TOML file, checked before anything starts: an unknown key is an error. `key=value` after the file on the command line
changes a key, with dots for tables: `train.lr_schedule.lr=1e-3`. A default of None means that the key is not set.
In `log_dir`, `data_dir` and `checkpoint` a leading `~` is expanded; `$NAME` is refused.

This page is printed from `config.py` by `python scripts/print_configuration.py`.

| key | values | default | meaning |
|---|---|---|---|"""


def rows(section: Section, properties: dict[str, Any], definitions: dict[str, Any], table: str = "") -> Iterator[str]:
    """Yield the rows of a table's own keys, then the rows of the tables in it."""
    tables = {key: value for key in properties if isinstance(value := getattr(section, key), Section)}
    for key, schema in properties.items():
        if key not in tables:
            default = getattr(section, key)
            shown = "None" if default is None else json.dumps(default)
            yield f"| `{table}{key}` | {values(schema)} | `{shown}` | {schema['description']} |"
    for key, value in tables.items():
        yield from rows(value, definitions[type(value).__name__]["properties"], definitions, f"{table}{key}.")


def values(schema: dict[str, Any]) -> str:
    """Return the type and bounds of a key, from its JSON schema."""
    if "anyOf" in schema:
        schema = schema["anyOf"][0]  # the other alternative is null
    if choices := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return ", ".join(f'`"{choice}"`' for choice in choices)
    kind = "two numbers" if schema["type"] == "array" else schema["type"]
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return ", ".join([kind, *(f"{sign} {schema[name]}" for name, sign in signs.items() if name in schema)])


def page() -> str:
    """Return the text of docs/configuration.md."""
    schema = Config.model_json_schema()
    return "\n".join([HEAD, *rows(Config(), schema["properties"], schema["$defs"]), ""])


if __name__ == "__main__":
    print(page(), end="")
