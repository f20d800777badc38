"""Whether trackers can be used as this machine is set up, before anything starts.

Without this a run would train to its end beside a tracker that never began. No service is asked,
and nothing is written.
"""

from __future__ import annotations

import configparser
import netrc
import os
from collections.abc import Callable, Collection
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from aligntune.errors import UserError

DATABASES = {"sqlite", "postgresql", "mysql", "mssql"}  # that MLflow writes to by itself
OF_DATABASES = ("sqlalchemy", "alembic")  # which mlflow-skinny does not install
WORDS = {"databricks", "databricks-uc", "uc"}  # addresses that are no folders

KEYLESS = {"offline", "dryrun", "disabled"}  # modes of W&B
KEYS = ("api_key", "identity_token_file")
HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # W&B's own, by its version


def check_ready(names: Collection[str]) -> None:
    """Raises UserError, with the cure, where a tracker of `names` could not begin here. The
    packages are there, as `check_trackers` has seen."""
    for name, check in CHECKS.items():
        if name in names:
            check()


def _mlflow() -> None:
    from mlflow import get_tracking_uri

    uri = get_tracking_uri()
    kind = urlsplit(uri).scheme.partition("+")[0]
    lacking = [name for name in OF_DATABASES if find_spec(name) is None]
    if kind in DATABASES and lacking:
        why = f"{', '.join(lacking)} for its database ({kind}) is not installed"
        cure = "pip install mlflow, "
    elif kind in ("file", "") and uri not in WORDS and not _takes_folders():
        why, cure = "this version writes to a folder only where it is told so", ""
    else:
        return
    raise UserError(
        f"tracking.trackers asks for 'mlflow', which cannot begin: {why}; {cure}set "
        "MLFLOW_TRACKING_URI to a server's address, or to a folder (file:///...) with "
        "MLFLOW_ALLOW_FILE_STORE=true, or take it out"
    )


def _takes_folders() -> bool:
    """Whether MLflow keeps runs in a folder, tried on one of no worth."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    with TemporaryDirectory() as folder:
        try:
            MlflowClient(Path(folder).as_uri())
        except MlflowException:
            return False
    return True


def _wandb() -> None:
    """Where W&B finds no key it asks for one, in a thread whose question nobody can answer."""
    said = _wandb_settings()
    if said.get("mode") in KEYLESS or any(said.get(key) for key in KEYS):
        return
    host = urlsplit(said.get("base_url", "")).netloc
    known = _machines()
    if any(known(each) for each in ([host] if host and host not in HOSTS else HOSTS)):
        return
    raise UserError(
        "tracking.trackers asks for 'wandb', which has no key here: call `wandb login`, set "
        "WANDB_API_KEY, or set WANDB_MODE=offline to keep the figures in output_dir, or take it out"
    )


def _wandb_settings() -> dict[str, str]:
    """W&B's settings: those of the user's file, of the working directory's, of the environment;
    the last that has one holds."""
    user = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    here = Path(os.environ.get("WANDB_DIR") or ".").expanduser()
    own = here / (".wandb" if (here / ".wandb").exists() else "wandb")
    files = configparser.ConfigParser(interpolation=None)
    with suppress(configparser.Error, UnicodeDecodeError):  # W&B warns and goes on without them
        files.read([user / "settings", own / "settings"])
    said = dict(files["default"]) if files.has_section("default") else {}
    names = ("mode", "base_url", *KEYS)
    set_now = {name: os.environ.get(f"WANDB_{name.upper()}") for name in names}
    return said | {name: value for name, value in set_now.items() if value}


def _machines() -> Callable[[str], object]:
    """What gives the login that the user's netrc has for a host."""
    named = os.environ.get("NETRC")
    places = [named] if named else ["~/.netrc", "~/_netrc"]
    for path in (Path(place).expanduser() for place in places):
        with suppress(OSError, netrc.NetrcParseError):  # W&B warns and goes on without it
            return netrc.netrc(str(path)).authenticators
    return lambda host: None


CHECKS: dict[str, Callable[[], None]] = {"mlflow": _mlflow, "wandb": _wandb}
