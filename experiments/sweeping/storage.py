"""Where a study lives: SQLite in the work directory, a database server, or a journal file."""

import itertools
import pathlib
import time
from typing import Any

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from experiments import cli
from experiments.sweeping.points import Space
from experiments.sweeping.samplers import make_sampler

_DEFINITION = "definition"
_OPEN_ATTEMPTS = 5
_DATABASES = ("sqlite", "postgresql", "mysql")
# What to install for a driver of SQLAlchemy's; others are packages of the same name.
_PACKAGES = {
    "psycopg": "'psycopg[binary]'",
    "psycopg2": "psycopg2-binary",
    "mysqldb": "mysqlclient",
}


def open_storage(url: str | None, workdir: pathlib.Path) -> BaseStorage:
    """Opens a storage, with its tables made where there are none.

    Args:
      url: of SQLAlchemy (`postgresql://`, `mysql://`, `sqlite:///`), or `journal:PATH` for a file
        on a disk that all workers share; None is `study.db` in `workdir`.
      workdir: exists.

    Raises:
      UsageError: the URL is of another kind, its driver is missing, or nothing answers there.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # The worker says what happens.
    url = f"sqlite:///{workdir.resolve() / 'study.db'}" if url is None else url
    scheme, _, path = url.partition(":")
    database = scheme.partition("+")[0]
    if scheme == "journal" and path:
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(path))
    if database not in _DATABASES or not path.startswith("//"):
        raise cli.UsageError(
            f"--storage={url}: use postgresql://user@host/name, mysql://user@host/name, "
            "sqlite:///PATH, or journal:PATH for a file on a shared disk"
        )
    # The cache that Optuna would put before it: one object for the study and for us.
    return optuna.storages.get_storage(_open_database(url, database))


def open_study(storage: BaseStorage, space: Space, name: str) -> optuna.Study:
    """Joins a study, or makes it.

    Raises:
      UsageError: the study there is of another sweep; the message names what differs.
    """
    directions = [objective.direction for objective in space.sweep.objectives]
    mine = space.definition()
    try:
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=directions,
            sampler=make_sampler(space.sweep),
            load_if_exists=True,
        )
    except KeyError as error:
        raise cli.UsageError(f"study {name!r} cannot be opened: {error}") from error
    if _DEFINITION not in study.user_attrs:
        study.set_user_attr(_DEFINITION, mine)
    theirs = study.user_attrs[_DEFINITION]
    differing = _differences(theirs, mine)
    if differing:
        raise cli.UsageError(
            f"study {name!r} is of another sweep ({'; '.join(differing[:5])}): "
            "take another --workdir or --study, or set these back"
        )
    return study


def study_exists(storage: BaseStorage, name: str) -> bool:
    """Whether there is a study of this name."""
    return name in optuna.get_all_study_names(storage)


def _open_database(url: str, database: str) -> RDBStorage:
    options: dict[str, Any] = {"pool_pre_ping": True}
    if database == "sqlite":
        options["connect_args"] = {"timeout": 60}
    for attempt in itertools.count(1):
        try:
            storage = RDBStorage(url, engine_kwargs=options)
        except ImportError as error:
            driver = sqlalchemy.make_url(url).get_driver_name()
            package = _PACKAGES.get(driver, driver)
            raise cli.UsageError(f"--storage={url}: pip install {package} ({error})") from error
        except sqlalchemy.exc.ArgumentError as error:
            raise cli.UsageError(f"--storage={url}: {error}") from error
        except sqlalchemy.exc.SQLAlchemyError as error:
            # Workers that begin together race for making the tables; all but one lose.
            if attempt == _OPEN_ATTEMPTS:
                reason = str(error).splitlines()[0]
                raise cli.UsageError(f"--storage={url} cannot be opened: {reason}") from error
            time.sleep(0.1 * 2**attempt)
        else:
            if database == "sqlite":
                _begin_immediately(storage.engine)
            return storage
    raise AssertionError("the loop returns or raises")


def _begin_immediately(engine: sqlalchemy.Engine) -> None:
    """Takes SQLite's write lock before a transaction reads, not at its first write.

    Optuna claims a trial by reading its state and then writing it. Servers lock the row between the
    two; SQLite does not, and two workers would both get the trial.
    """

    def leave_transactions_to_us(connection: Any, record: object) -> None:
        connection.isolation_level = None

    def begin(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections that were made before
    sqlalchemy.event.listen(engine, "connect", leave_transactions_to_us)
    sqlalchemy.event.listen(engine, "begin", begin)


def _differences(theirs: dict[str, Any], mine: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in dict.fromkeys([*theirs, *mine]):
        old, new = theirs.get(key), mine.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: there {old!r}, here {new!r}")
    return found
