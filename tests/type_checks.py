"""Types are checked while tests run: array shapes by jaxtyping, functions without shapes by beartype alone.

jaxtyping's import hook wraps every function of the package to check shapes, and those without shapes are called most:
that took a sixth of a trial's CPU time. To be imported before the package.
"""

import inspect
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import beartype
import jaxtyping

WITH_SHAPES = jaxtyping.jaxtyped


def checked(given: Any = None, *, typechecker: Any) -> Any:
    """A function whose types are checked when it is called; a class is handed on."""
    if given is None:
        return lambda wrapped: checked(wrapped, typechecker=typechecker)
    hints = hints_of(given) if inspect.isfunction(given) else None
    if hints is None or any(map(has_shape, hints.values())):
        return WITH_SHAPES(given, typechecker=typechecker)
    given.__annotations__ = hints
    return beartype.beartype(given)


def hints_of(function: Callable[..., Any]) -> dict[str, Any] | None:
    """The types of arguments and result; None where a name is not there at run time."""
    try:
        return get_type_hints(function, include_extras=True)
    except (NameError, AttributeError, TypeError):
        return None


def has_shape(hint: Any) -> bool:
    """Whether an array's shape stands in a type."""
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(has_shape, get_args(hint)))


jaxtyping.jaxtyped = checked  # pyright: ignore[reportAttributeAccessIssue]  the hook looks it up when it loads a module
