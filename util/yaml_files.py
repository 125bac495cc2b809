"""YAML as people write it, and as nobody can harm with it: no alias, no depth, no key twice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

import yaml
from yaml.reader import ReaderError

_LARGEST = 2**20  # bytes; a recipe has one or two thousand
_DEEPEST = 10  # levels; a sweep has four


def load(path: str | Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds. ValueError names the file, the line and what is wrong there."""
    try:
        with open(path, "rb") as file:
            text = file.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise ValueError("more than 1 MiB, which no file of settings needs")
        content = parse(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if content is None:
        raise ValueError(f"{path}: is empty; write one setting a line, such as epochs: 400")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a mapping of names to values, such as epochs: 400")
    return content


def parse(text: str) -> Any:
    """Return what YAML text means. ValueError, in one sentence, for what is no YAML or could take all memory."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"line {mark.line + 1}: {', '.join(filter(None, (error.context, error.problem)))}") from error
    except ReaderError as error:
        raise ValueError(f"character {error.position}: {error.reason}") from error
    except (ValueError, OverflowError) as error:  # a date or a number that is none
        raise ValueError(f"a value cannot be read ({error})") from error


def dump(content: dict[str, Any]) -> str:
    """Return YAML text that `parse` reads as `content`, in its order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """PyYAML's loader, without what a settings file never needs. YAML 1.1 reads 1e-3 as text, people as a number."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            _refuse(event, f"the alias *{event.anchor} is not supported; write the value out")
        if getattr(event, "tag", None):
            _refuse(event, f"the tag {event.tag} is not supported; leave it out")
        if self.depth == _DEEPEST:
            _refuse(event, f"more than {_DEEPEST} levels deep")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                _refuse(key, "a key must be a word")
            if key.value in seen:
                _refuse(key, f"the key {key.value} stands twice; delete one")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _refuse(what: yaml.Event | yaml.Node, problem: str) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=what.start_mark)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
    )
