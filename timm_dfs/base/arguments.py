"""Suggestions for misspelt keyword arguments."""

import difflib
from collections.abc import Collection

SIMILARITY = 0.87
"""Smallest similarity, in [0, 1] as difflib measures it, at which a name counts as a misspelling of another."""


def check_names(owner: str, given: Collection[str], known: Collection[str]) -> None:
    """Raise ``TypeError`` for a name that is not known but similar to one that is.

    Args:
        owner: Name of the class or model, for the message.
        given: Names of keyword arguments.
        known: Names to compare them with.
    """
    for name in given:
        similar = difflib.get_close_matches(name.removeprefix("num_"), known, 1, SIMILARITY)
        if similar and name not in known:
            raise TypeError(f"{owner} has no argument {name!r}; did you mean {similar[0]!r}?")
