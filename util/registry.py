"""Names for classes that a user chooses: registered ones, or their own as `package.module:Class`."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from util.suggest import nearest


class Registry:
    """Classes by name.

    Args:
        kind: what they are, for messages, such as "masking strategy".
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._classes: dict[str, type] = {}

    def register(self, name: str) -> Callable[[type], type]:
        """Return a class decorator that makes a class available as `name`. A name that is taken is an error."""

        def add(found: type) -> type:
            if name in self._classes:
                raise ValueError(
                    f"the {self.kind} {name!r} is registered already, by {self._classes[name].__qualname__}"
                )
            self._classes[name] = found
            found.registered_name = name
            return found

        return add

    def available(self) -> list[str]:
        """Return the registered names."""
        return sorted(self._classes)

    def find(self, name: str) -> type:
        """Return the class of a registered name, or import `package.module:Class`; the current folder is importable.

        Raises:
            ValueError: unknown name (with the nearest one), or the import failed.
        """
        if ":" in name:
            return self._import(name)
        if name not in self._classes:
            raise ValueError(
                f"there is no {self.kind} {name!r}{nearest(name, self._classes)}; "
                f"available: {', '.join(self.available())}, or your own as package.module:Class"
            )
        return self._classes[name]

    def create(self, name: str, **options):
        """Build what `name` stands for from its own options.

        Raises:
            ValueError: unknown name (with the nearest one), import failure, unknown or impossible option.
        """
        return self.call(name, self.find(name), options)

    def call(self, name: str, factory: Callable, options: dict, given: tuple = ()):
        """Call `factory(*given, **options)`; ValueError names an option that it does not have."""
        parameters = list(inspect.signature(factory).parameters.values())[len(given) :]
        names = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
        if len(names) == len(parameters):
            for option in options:
                if option not in names:
                    hint = nearest(option, names)
                    raise ValueError(f"the {self.kind} {name!r} has no option {option!r}{hint}; it has {join(names)}")
        try:
            return factory(*given, **options)
        except TypeError as error:
            raise ValueError(f"the {self.kind} {name!r} cannot be made from {join(options)}: {error}") from error

    def _import(self, path: str) -> type:
        try:
            return import_attribute(path)
        except Exception as error:  # importing runs the user's code, which may fail in any way
            raise ValueError(
                f"the {self.kind} {path!r} cannot be imported ({error}); write package.module:Class"
            ) from error


def import_attribute(path: str) -> Any:
    """Import `package.module:name`, also from the current folder. Raises whatever the module does."""
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:  # torchrun and `python path/main.py` do not put it there
        sys.path.append(os.getcwd())
    return getattr(importlib.import_module(module), name)


def join(names: Iterable[str]) -> str:
    """Return the names with commas between them, or "none"."""
    return ", ".join(names) or "none"
