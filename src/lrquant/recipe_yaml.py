"""YAML as recipes are written in: plain values without aliases and duplicate keys."""

import reprlib
from typing import Any

import yaml


class RecipeLoader(yaml.SafeLoader):
    """Safe YAML without aliases, which could expand to more data than fits into memory, and without duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed in a recipe")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"the key {shown(twice)} appears twice")
        return super().construct_mapping(node, deep)


def shown(value: Any) -> str:
    """`value` in a line of an error, shortened."""
    try:
        return reprlib.repr(value)
    except ValueError:  # a number with more digits than Python prints
        return "a number of thousands of digits"
