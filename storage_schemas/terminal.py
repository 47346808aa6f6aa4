"""How both commands end: 0 done, 1 it failed, 2 you asked wrongly; one sentence for a person's mistake."""

from __future__ import annotations

import errno
import logging
import sys
import warnings
from typing import Any

import click

from storage_schemas.errors import CacheError, RequestError

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


def set_up_logging(level: int = logging.INFO) -> None:
    """What a program has to say beside its results goes to stderr; a warning is its sentence, not its source line."""
    logging.basicConfig(level=level, stream=sys.stderr, format="%(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    warnings.formatwarning = lambda message, *place: str(message)
    logging.captureWarnings(True)


class Group(click.Group):
    """A click group that turns a person's mistake into one sentence on stderr and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (RequestError, CacheError) as error:
            sentence = str(error)
        except OSError as error:
            if error.errno not in _DISK_ERRORS:
                raise
            sentence = f"{error.filename or 'the output'}: {error.strerror}; make room or choose another place"
        click.echo(f"error: {sentence}", err=True)
        return ctx.exit(2)
