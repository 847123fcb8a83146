"""YAML: plain values alone, PyYAML's (1.1) with one rule of 1.2: `3e-3` is a number, with or without a dot or a sign.

`config` imports this only where it reads or writes YAML: neither a table nor a help text needs PyYAML.
"""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # a few bytes of them are gigabytes of values
            raise yaml.YAMLError("a configuration has no aliases (*name); write the value out")
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    pass


# YAML 1.1 takes `3e-3` for a string, and a learning rate is written just so. The dumper needs the rule too, or a path
# called "1e3" would be written without quotes and come back as a number.
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def read_yaml(text: str) -> Any:
    """Read plain values alone. Raises `ValueError` for what isn't YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from error
    except RecursionError:
        raise ValueError("not valid YAML: it is nested too deeply") from None


def write_yaml(values: Any) -> str:
    """Write mappings, lists, texts and numbers, in their order."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False)
    return text
