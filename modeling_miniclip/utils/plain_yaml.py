"""YAML from users: plain values only, whatever the file contains."""

from typing import Any

import yaml

from ..errors import one_line


class _PlainLoader(yaml.SafeLoader):
    """A SafeLoader whose aliases name scalars only: aliased lists and mappings can grow without bound or never end."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        aliased = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if aliased and isinstance(node, yaml.CollectionNode):
            raise ValueError(f"an alias of a list or mapping, first written at{node.start_mark}; write it out")
        return node


def load_yaml(text: str) -> Any:
    """The value of a YAML text, without tags that build objects.

    Raises:
        ValueError: the text is not YAML, or contains an invalid value such as a date on the 99th.
    """
    try:
        return yaml.load(text, _PlainLoader)  # a SafeLoader
    except Exception as error:  # its constructors raise many: KeyError, AttributeError, RecursionError
        raise ValueError(one_line(error)) from error
