"""The words of a command by which something is made anew."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def changed(given: Mapping[str, Any], defaults: Mapping[str, Any], option: Callable[[str], str]) -> Iterator[str]:
    """The options, named by `option`, by which settings differ from the defaults; `shlex.join` quotes them."""
    for name, value in given.items():
        default = defaults.get(name)
        if value != (list(default) if isinstance(default, tuple) and isinstance(value, list) else default):
            yield from (option(name), value if isinstance(value, str) else json.dumps(value))
