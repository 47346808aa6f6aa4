"""What can go wrong, by whose hand.

`RequestError` is a person's mistake and `CacheError` the state of a cache; both carry one sentence that says what was
expected, what came and what to do, and both programs turn them into that sentence on stderr and exit code 2.
Anything else is ours and keeps its traceback.
"""

from __future__ import annotations


class RequestError(ValueError):
    """A person asked for something that cannot be done; the message says what was expected, what came, what to do."""


class CacheError(Exception):
    """A cache is not what it should be."""


class IdentityMismatch(CacheError):
    """A cache or a student was made with something else; the message names every field that differs."""


class CorruptShard(CacheError):
    """Stored bytes do not pass the checksum or the invariants that vouch for them."""


class IncompleteCache(CacheError):
    """A file that the cache needs is missing: not sealed yet, or lost."""


class UnsupportedFormat(CacheError):
    """The bytes are well kept, but this version does not know their format."""
