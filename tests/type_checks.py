"""Types are checked while tests run: functions of tensors by jaxtyping, with their shapes; others by beartype alone.

jaxtyping's import hook wraps every function of the package to check shapes, and those without tensors are called most:
that took a sixth of a trial's CPU time. To be imported before the package.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, get_args, get_type_hints

import jaxtyping
from torch import Tensor

WITH_SHAPES = jaxtyping.jaxtyped


def checked(given: Any = None, *, typechecker: Any) -> Any:
    """A function whose types are checked when it is called; a class is handed on."""
    if given is None:
        return partial(checked, typechecker=typechecker)
    hints = hints_of(given) if inspect.isfunction(given) else None
    if hints is None or any(map(has_tensors, hints.values())):
        return WITH_SHAPES(given, typechecker=typechecker)
    given.__annotations__ = hints
    return typechecker(given)


def hints_of(function: Callable[..., Any]) -> dict[str, Any] | None:
    """The types of arguments and result; None where a name is not there at run time."""
    try:
        return get_type_hints(function, include_extras=True)
    except (NameError, AttributeError, TypeError):
        return None


def has_tensors(hint: Any) -> bool:
    """Whether a type is, or holds, one of tensors. (The export turns off jaxtyping's checks where it traces them.)"""
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray | Tensor):
        return True
    return any(map(has_tensors, get_args(hint)))


jaxtyping.jaxtyped = checked  # pyright: ignore[reportAttributeAccessIssue]  the hook looks it up when it loads a module
