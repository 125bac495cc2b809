"""Command line and YAML file -> typed settings. A user's mistake is one line, exit status 2."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
import time
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from util import yaml_files
from util.config import KINDS, Settings, fields_of_kind
from util.files import expand_home
from util.suggest import nearest

SettingsT = TypeVar("SettingsT", bound=Settings)

# Flags of MAE's scripts that have no counterpart, and what to do instead.
_RETIRED = {
    "world_size": "torchrun says how many processes there are (--nnodes, --nproc_per_node); leave it out",
    "local_rank": "torchrun tells every process its rank; start the script with torchrun and leave it out",
    "dist_url": "torchrun says where the processes meet (--rdzv_endpoint, or --master_addr and --master_port)",
    "dist_on_itp": "torchrun and submitit_launch.py need no such switch; leave it out",
    "dist_backend": "it follows from --device: nccl on GPUs, gloo on CPUs; leave it out",
    "start_epoch": "a run continues at the step of its checkpoint; give the same command again, or --resume FILE",
    "resplit": "random erasing is never applied to a part of the batch alone; leave it out",
    "use_volta32": "give it to submitit_launch.py, which chooses the machines",
}
_BOOLEANS = {"true": True, "yes": True, "false": False, "no": False}


def parse(settings_class: type[SettingsT], argv: list[str] | None = None) -> SettingsT:
    """Return the settings of the command line and of `--config FILE.yaml`, of which the command line wins.

    Exits with status 2 and one line on stderr for an unknown key (with the nearest one), a wrong type or an
    impossible value; with status 0 after `--help` and `--print_config`.
    """
    given, unknown = make_parser(settings_class).parse_known_args(argv)
    # `python -m torch.distributed.launch` passes on what the environment says, too.
    rank = os.environ.get("LOCAL_RANK")
    unknown = [word for word in unknown if word not in (f"--local-rank={rank}", f"--local_rank={rank}")]
    with exit_on_user_error():
        if unknown:
            raise ValueError(_not_known(unknown[0], settings_class))
        values: dict[str, Any] = {}
        for path in given.config:
            _update(settings_class, values, _read(settings_class, path), f"{path}: ")
        flags = {name: value for name, value in vars(given).items() if name not in ("config", "print_config")}
        _update(settings_class, values, flags)
        settings = settings_class(**values)
        settings.check()
    if given.print_config:
        if os.environ.get("RANK", "0") == "0":
            print(as_yaml(settings), end="")
        sys.exit(0)
    return settings


def make_parser(settings_class: type[Settings]) -> argparse.ArgumentParser:
    """Return the parser of a task: one flag for every field, whose value is still text."""
    parser = _Parser(
        usage="%(prog)s [--config FILE] [--flag VALUE ...]",
        description=settings_class.__doc__,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", metavar="FILE", action="append", default=[], help="YAML of the flags below, which override it"
    )
    parser.add_argument("--print_config", action="store_true", default=False, help="print all settings as YAML")
    hints = typing.get_type_hints(settings_class)
    for kind, title in KINDS.items():
        group = parser.add_argument_group(title)
        for name, field in fields_of_kind(settings_class, kind).items():
            hint, text = hints[name], field.metadata["help"].replace("%", "%%")
            default = field.default_factory() if field.default is dataclasses.MISSING else field.default
            if default not in (None, []) and "default" not in text:
                text += f" (default: {' '.join(map(str, default)) if isinstance(default, list) else default})"
            if typing.get_origin(hint) is list:
                action = "extend" if field.metadata["pairs"] else "store"
                group.add_argument(f"--{name}", nargs="*", action=action, metavar="VALUE", help=text)
            elif bool in (hint, *typing.get_args(hint)):
                group.add_argument(f"--{name}", nargs="?", const="true", metavar="true|false", help=text)
                group.add_argument(
                    f"--no_{name}", dest=name, action="store_const", const="false", help=argparse.SUPPRESS
                )
            else:
                group.add_argument(f"--{name}", metavar="VALUE", help=text)
    return parser


def as_yaml(settings: Settings) -> str:
    """Return all settings as YAML that `--config` takes again, grouped by kind."""
    values = settings.as_dict()
    groups = {title: fields_of_kind(type(settings), kind) for kind, title in KINDS.items()}
    return "".join(
        f"# {title}\n{yaml_files.dump({name: values[name] for name in group})}" for title, group in groups.items()
    )


def parse_options(pairs: list[str], flag: str = "masking_args") -> dict[str, Any]:
    """Return `["delta_r=0.2", ...]` as `{"delta_r": 0.2, ...}`. ValueError names the `flag` and a pair that is none."""
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--{flag} {pair}: write name=value, such as delta_r=0.15")
        options[name] = _plain(value)
    return options


def path(text: str) -> Path:
    """Return a path with its `~` expanded: the `type` of a script's flag."""
    return Path(path_text(text))


def path_text(text: str) -> str:
    """Return a path with its `~` expanded, as text: the `type` of a script's flag."""
    try:
        return expand_home(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def check_printable(name: str, value: str) -> None:
    """Raise ValueError for a line break or control character: it would end the #SBATCH line that holds the value."""
    if not value.isprintable():
        raise ValueError(f"--{name} {value!r}: has a control character, such as a line break; take it out")


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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _exit(message)


def _not_known(word: str, settings_class: type[Settings]) -> str:
    if not word.startswith("-"):
        return f"{word!r}: no flag stands before this value; see --help"
    key = word.lstrip("-").partition("=")[0].replace("-", "_")
    if key in _RETIRED:
        return f"--{key} is a flag of MAE's that does not exist here: {_RETIRED[key]}"
    known = [field.name for field in dataclasses.fields(settings_class)]
    return f"there is no setting {key!r}{nearest(key, known)}; --help lists all"


def _read(settings_class: type[Settings], path: str) -> dict[str, Any]:
    """Return the values of a file; of lists as the command line has them."""
    try:
        content = yaml_files.load(expand_home(path))
    except ValueError as error:
        raise ValueError(f"--config {error}") from error
    hints = typing.get_type_hints(settings_class)
    for name, value in content.items():
        if name not in {field.name for field in dataclasses.fields(settings_class)}:
            raise ValueError(f"{path}: {_not_known(f'--{name}', settings_class)}")
        if typing.get_origin(hints[name]) is list:
            content[name] = _as_list(value)
    return content


def _update(settings_class: type[Settings], values: dict[str, Any], given: dict[str, Any], where: str = "") -> None:
    """Add `given`, converted to the fields' types, to `values`; single entries of lists of pairs.

    What a given setting `replaces` leaves `values`, unless `given` has it, too.
    """
    hints = typing.get_type_hints(settings_class)
    for name, value in given.items():
        field = settings_class.__dataclass_fields__[name]
        try:
            value = _convert(hints[name], value)
            if field.metadata["path"] and value is not None:
                value = expand_home(value) or None  # MAE's scripts give "" for none
        except _WrongTypeError as error:
            raise ValueError(f"{where}--{name} {error}: must be {_describe(hints[name])}") from error
        except ValueError as error:
            raise ValueError(f"{where}--{name} {error}") from error
        if field.metadata["pairs"] and value:
            value = list({pair.partition("=")[0]: pair for pair in [*values.get(name, []), *value]}.values())
        if value not in (None, []) and value is not False:
            for other in set(field.metadata["replaces"]) - given.keys():
                values.pop(other, None)
        values[name] = value


class _WrongTypeError(ValueError):
    """Its text is the value."""


def _convert(hint: Any, value: Any) -> Any:
    """Return `value`, which is text of the command line or a value of YAML, as the type says. _WrongTypeError."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return [_convert(parts[0], item) for item in value]
    if typing.get_origin(hint) is typing.Literal:
        if value in parts:
            return value
    elif parts:  # a union
        for part in sorted(parts, key=lambda part: part is not types.NoneType):
            with contextlib.suppress(_WrongTypeError):
                return _convert(part, value)
    elif hint is types.NoneType:
        if value in (None, "null"):
            return None
    elif hint is bool:
        if str(value).lower() in _BOOLEANS:
            return _BOOLEANS[str(value).lower()]
    elif hint is str:
        if isinstance(value, str):
            return value
    elif not isinstance(value, bool) and isinstance(value, (str, int, hint)):
        with contextlib.suppress(ValueError, OverflowError):
            number = hint(value)
            if math.isfinite(number):
                return number
    raise _WrongTypeError("null" if value is None else value)


def _as_list(value: Any) -> list:
    """Return `224` for `[224]`, nothing for `[]`, and `{a: 1}` for `["a=1"]`, as people write them."""
    if value is None:
        return []
    if isinstance(value, dict):
        return [
            f"{name}={item if isinstance(item, str) else json.dumps(item, default=str)}" for name, item in value.items()
        ]
    return value if isinstance(value, list) else [value]


def _plain(text: str) -> Any:
    """Return what YAML makes of one value of the command line; text that is no YAML as it is."""
    try:
        value = yaml_files.parse(text)
    except ValueError:
        return text
    return text if value is None and text != "null" else value


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
