"""Which keys of a config are read."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from detectron2.config import CfgNode
from yacs.config import CfgNode as YacsNode


def _name_nodes(cfg: CfgNode, prefix: str = "") -> None:
    cfg.__dict__["_prefix"] = prefix  # survives cfg.clone()
    for key, value in cfg.items():
        if isinstance(value, YacsNode):
            _name_nodes(value, f"{prefix}{key}.")


@contextmanager
def recorded(cfg: CfgNode) -> Iterator[set[str]]:
    """Inside, the dotted keys that are read of ``cfg`` and its clones come into the set: cfg.A.B, cfg["A"], get."""
    read: set[str] = set()
    _name_nodes(cfg)

    def note(node: YacsNode, key: str) -> None:
        prefix = node.__dict__.get("_prefix")
        if prefix is not None and dict.__contains__(node, key):
            read.add(prefix + key)

    def get_attribute(node: YacsNode, key: str) -> Any:
        note(node, key)
        if key in node:
            return dict.__getitem__(node, key)
        raise AttributeError(key)

    def get_item(node: YacsNode, key: str) -> Any:
        note(node, key)
        return dict.__getitem__(node, key)

    def get(node: YacsNode, key: str, default: Any = None) -> Any:
        note(node, key)
        return dict.get(node, key, default)

    original = YacsNode.__getattr__
    YacsNode.__getattr__, YacsNode.__getitem__, YacsNode.get = get_attribute, get_item, get
    try:
        yield read
    finally:
        YacsNode.__getattr__ = original
        del YacsNode.__getitem__, YacsNode.get
