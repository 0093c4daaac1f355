"""The errors pathtune raises for its users, and the words they are made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PathtuneError(Exception):
    """The data or the run fails a check (exit code 1 on the command line)."""

    exit_code = 1


class UsageError(PathtuneError):
    """A wrong option, name or combination of options (exit code 2)."""

    exit_code = 2


def unknown(what: str, given: str, known: Iterable[str]) -> str:
    """Return one sentence that names `given`, what is allowed and the nearest match.

    Parameters
    ----------
    what
        The kind of thing that was asked for, e.g. ``"method"``.
    given
        What the user wrote.
    known
        The names that exist.
    """
    names = sorted(known)
    close = difflib.get_close_matches(given.lower(), [n.lower() for n in names], n=1)
    match = next((n for n in names if close and n.lower() == close[0]), None)
    hint = f" Did you mean {match!r}?" if match else ""
    return f"unknown {what} {given!r}; known: {', '.join(names) or 'none'}.{hint}"
