"""Where a study is kept: a journal file or any database URL; whatever goes wrong there is one error with its mend."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from zplan.errors import ConfigError, MachineError
from zplan.tuner import journal

T = TypeVar("T")


def open_storage(path: str) -> BaseStorage:
    """The journal file, created or mended, or the database.

    Raises:
        ConfigError: no driver for the URL; the file is something else.
        MachineError: it cannot be read or written.
    """
    if "://" in path:
        return guarded(path, lambda: _open_database(path))
    return guarded(path, lambda: journal.open_journal(Path(path)))


def _open_database(url: str) -> RDBStorage:
    """Tuners that start together all create the tables; whoever comes second fails, and finds them a moment later."""
    for pause_seconds in (0.1, 0.3, 1.0):
        try:
            return RDBStorage(url)
        except (ImportError, ValueError, ArgumentError) as error:  # the last: no such kind of database, no URL
            raise ConfigError(
                f"--study {without_password(url)} cannot be opened: {str(error).splitlines()[0]}",
                because="a database URL is SQLAlchemy's, and its driver is not installed with zplan",
                fix="pip install psycopg2-binary (postgresql://) or pymysql (mysql+pymysql://)",
            ) from error
        except SQLAlchemyError:
            time.sleep(pause_seconds)
    return RDBStorage(url)


def guarded(path: str, action: Callable[[], T]) -> T:
    """Disk full, no permission, locked or lost database: one error class, with the path."""
    try:
        return action()
    except OSError as error:
        raise MachineError(
            f"the study {without_password(path)} cannot be read or written: {error.strerror or error}",
            because="every finished trial is stored at once; nothing that finished before is lost",
            fix="free disk space or mend the permissions, then run the same command again: it resumes",
        ) from error
    except SQLAlchemyError as error:
        raise MachineError(
            f"the study's database cannot be read or written: {str(error).splitlines()[0]}",
            because="it is locked, unreachable or full",
            fix="run the same command again when it is back: it resumes",
        ) from error


def without_password(study: str) -> str:
    """A study's name for plans, messages and caches; a file's is unchanged."""
    return re.sub(r"(://[^:/@]*):[^/@]*@", r"\1:***@", study)
