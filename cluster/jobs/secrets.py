"""Secrets of a job, beside its runtime environment: Ray writes that, values and all, to the logs of
every node, and its Jobs server shows it.

They lie in the head's key-value store from the submission to the end of the run. A hook that Ray
calls in every worker of the job sets them there; the driver, which it does not call, takes them by
itself before all else, and removes them from the store however it ends. Only the name of the key is
in the environment.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from typing import Any

VARIABLE = "ALIGNTUNE_SECRETS"  # holds the key
HOOK = f"{__name__}.take"
ERASED = b""  # in place of what a job that was not taken would have had


def new_key() -> str:
    """Of the store, and of the Jobs server's path for packages that writes to it."""
    return f"aligntune-{uuid.uuid4().hex}"


def packed(values: Mapping[str, str]) -> bytes:
    """As they lie in the store."""
    return json.dumps(dict(values)).encode()


def take() -> None:
    """Set the job's secrets in this process.

    Raises KeyError where they are gone from the store.
    """
    key = os.environ[VARIABLE]
    content = _store().internal_kv_get(_address(key), None)
    if not content:
        raise KeyError(
            f"the secrets of this job ({key}) are gone: its run has ended, or the head was started "
            "anew; submit it again"
        )
    os.environ.update(json.loads(content))


def of_a_job() -> bool:
    """Whether this process is of a job that has some."""
    return VARIABLE in os.environ


def forget() -> None:
    """Remove the job's secrets from the store, where they are still there. Raises RpcError where
    the head does not answer."""
    _store().internal_kv_del(_address(os.environ[VARIABLE]), False, None)


def _store() -> Any:
    """The head's, for a process that Ray has connected and for one that it has not."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    return internal_kv_get_gcs_client() or GcsClient(address=os.environ["RAY_ADDRESS"])


def _address(key: str) -> bytes:
    return f"gcs://{key}".encode()  # what the Jobs server makes of a package's name
