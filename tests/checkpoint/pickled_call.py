"""A pickle that calls a function when its code is executed, which no reader of checkpoints may do."""

from __future__ import annotations

from collections.abc import Callable


class PickledCall:
    """Calls `function(*arguments)` when it is unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call
