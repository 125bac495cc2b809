"""Command line and YAML file -> typed settings, through jsonargparse. A user's mistake is one line, exit status 2."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
import time
import typing
from collections.abc import Iterator
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ActionYesNo, ArgumentParser, set_loader

from util.config import Settings
from util.suggest import nearest

SettingsT = TypeVar("SettingsT", bound=Settings)


def parse(settings_class: type[SettingsT], argv: list[str] | None = None) -> SettingsT:
    """Settings from the command line and from `--config FILE.yaml`, of which the command line wins.

    Exits with status 2 and one line on stderr for an unknown key (with the nearest one), a wrong type or an
    impossible value.
    """
    parser = make_parser(settings_class)
    try:
        given = parser.parse_args(argv)
    except UnicodeDecodeError as error:
        _exit(f"--config: not a text file ({error})")
    values = {field.name: given[field.name] for field in dataclasses.fields(settings_class)}
    settings = settings_class(**values)
    with exit_on_user_error():
        settings.check()
    return settings


def make_parser(settings_class: type[Settings]) -> ArgumentParser:
    """The parser of a task: one flag and one YAML key for every field."""
    fields = {field.name: field for field in dataclasses.fields(settings_class)}
    hints = {name: hint for name, hint in typing.get_type_hints(settings_class).items() if name in fields}
    lists = {name for name, hint in hints.items() if typing.get_origin(hint) is list}
    set_loader("settings", lambda text: _load_yaml(text, hints), exceptions=(yaml.YAMLError,))
    parser = _Parser(
        prog=os.path.basename(sys.argv[0]),
        allow_abbrev=False,
        parser_mode="settings",
        description=settings_class.__doc__,
    )
    parser.add_argument("--config", action="config", help="YAML file of the keys below; the command line overrides it")
    for name, field in fields.items():
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        keywords = {"default": default, "help": field.metadata["help"]}
        if hints[name] is bool:
            keywords |= {"action": ActionYesNo(yes_prefix="", no_prefix="no_"), "nargs": "?"}
        elif name in lists:
            keywords |= {"type": typing.get_args(hints[name])[0], "nargs": "*"}
        else:
            keywords |= {"type": hints[name]}
        if hints[name] == bool | None:
            keywords |= {"nargs": "?", "const": True}
        parser.add_argument(f"--{name}", **keywords)
    parser.types = {name: _describe(hint) for name, hint in hints.items()}
    return parser


def parse_options(pairs: list[str], flag: str = "masking_args") -> dict[str, Any]:
    """Return `["delta_r=0.2", ...]` as `{"delta_r": 0.2, ...}`. ValueError names the `flag` and a pair that is none."""
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--{flag} {pair}: write name=value, such as delta_r=0.15")
        options[name] = _number(value)
    return options


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a ValueError into its message on stderr and exit status 2."""
    try:
        yield
    except ValueError as error:
        _exit(str(error))


def _exit(message: str) -> NoReturn:
    # Under a launcher one process speaks; the others wait, because the first exit makes the launcher end them all.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{os.path.basename(sys.argv[0])}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)
    sys.exit(2)


class _Parser(ArgumentParser):
    types: dict[str, str]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: (.*)|Option '([^']+)' is not accepted", message)
        wrong = re.match(r'Parser key "(\w+)"', message)
        value = re.search(r"(?:Given value|Got value): (.*)", message)
        if unknown and unknown[1] and not unknown[1].startswith("-"):
            _exit(f"{unknown[1]!r}: no flag stands before this value; see --help")
        elif unknown:
            self._unknown((unknown[1] or unknown[2]).split()[0])
        elif wrong and value and wrong[1] in self.types:
            _exit(f"--{wrong[1]} {value[1].strip()}: must be {self.types[wrong[1]]}")
        _exit(message)

    def _unknown(self, name: str) -> NoReturn:
        key = name.lstrip("-").split("=")[0]
        _exit(f"there is no setting {key!r}{nearest(key, self.types)}; --help lists all")


def _load_yaml(text: str, hints: dict[str, Any]) -> Any:
    content = yaml.load(text, Loader=_Loader)
    if not isinstance(content, dict):
        return content
    for name in hints.keys() & content.keys():
        hint, value = hints[name], content[name]
        optional = type(None) in typing.get_args(hint)
        if typing.get_origin(hint) is list:
            content[name] = _as_list(value)
        elif (value is None and not optional) or (hint is bool and not isinstance(value, bool)):
            _exit(f"--{name} {'null' if value is None else value}: must be {_describe(hint)}")
    return content


def _as_list(value: Any) -> Any:
    """`224` for `[224]`, nothing for `[]`, and `{a: 1}` for `["a=1"]`, as people write them."""
    if value is None:
        return []
    if isinstance(value, dict):
        return [f"{name}={item}" for name, item in value.items()]
    return value if isinstance(value, list) else [value]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text; people and YAML 1.2 read a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _number(text: str) -> Any:
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text
    return text if value is None else value


def _describe(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(map(str, parts))
    if origin is list:
        return f"{_describe(parts[0])}, or several"
    if parts:  # a union
        return " or ".join(_describe(part) for part in parts)
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names[hint]
