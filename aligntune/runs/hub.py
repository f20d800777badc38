"""A copy of a trained model on the Hugging Face hub: what is checked before a run, the push at its
end, and why a push failed, with the cure.

Invariant: the token goes to the hub alone, and no message holds it. A push reads the folder that it
copies, and changes nothing there.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from actors.models.hub import ask_again, switched_off
from aligntune.config.records import HubSpec
from aligntune.errors import UserError

WEIGHTS = (".safetensors", ".safetensors.index.json")
ADAPTER = "adapter"  # the folder in an export that holds LoRA's weights alone

_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})")  # as hf_xet tells it
_ROOM = re.compile(r"storage|quota|payment", re.IGNORECASE)


class PublicThere(Exception):
    """The hub has the name already, and anyone may read it, where a private copy was asked for."""


def check_hub(spec: HubSpec) -> None:
    """Whether a push has a name that the hub takes, a token, and a hub, before anything starts.

    Raises UserError.
    """
    name = spec.push_to
    if name is None:
        return
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"hub.push_to={name} is no name for the hub: {_line(error)}") from error
    if get_token() is None:
        raise UserError(
            f"hub.push_to={name} needs a token; set HF_TOKEN or call `hf auth login`, or remove it"
        )
    if switched_off():
        raise UserError(
            f"hub.push_to={name} needs the hub, and HF_HUB_OFFLINE=1 keeps this process from it; "
            "unset it, or remove hub.push_to"
        )


def pushed_to(folder: Path, name: str, private: bool) -> str:
    """Copy a model's folder to the hub's `name`, which is made where it is not there; its address.

    Weights that another model has left there are removed, or a loader might take them for this
    one's; other files stay.

    Raises:
        PublicThere: it is there and public, though `private` was asked for; nothing is copied.
        Exception: what the hub's client raises.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars

    ask_again()
    disable_progress_bars()  # the run has lines of its own on this terminal
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=get_token())
    api.create_repo(name, private=private, exist_ok=True)
    if private and api.repo_info(name).private is False:
        raise PublicThere
    stale = left_over(api.list_repo_files(name), folder)
    api.upload_folder(
        repo_id=name,
        folder_path=folder,
        commit_message="A model by aligntune",
        delete_patterns=[glob.escape(file) for file in stale] or None,
    )
    return f"{api.endpoint}/{name}"


def left_over(there: Iterable[str], folder: Path) -> list[str]:
    """The files of another model among those `there`: weights, and an adapter, that `folder` has
    not."""

    def is_weight(file: PurePosixPath) -> bool:
        at_top = file.parent == PurePosixPath() and file.name.endswith(WEIGHTS)
        return at_top or file.parts[0] == ADAPTER

    return [
        file for file in there if is_weight(PurePosixPath(file)) and not (folder / file).is_file()
    ]


def why_not(error: Exception, spec: HubSpec, folder: Path) -> str:
    """Why a push failed and what mends it, on one line and without the token."""
    cause, cure = _cause(error, str(spec.push_to))
    private = ["--private"] if spec.private else []
    again = shlex.join(["hf", "upload", str(spec.push_to), str(folder), ".", *private])
    return f"{_without_token(cause)}; {cure}, then call `{again}`: the model is whole on this disk"


def _cause(error: Exception, name: str) -> tuple[str, str]:
    """What happened, and its cure."""
    from httpx import TransportError
    from huggingface_hub.errors import HfHubHTTPError

    below = error.__cause__
    if isinstance(error, RuntimeError) and isinstance(below, HfHubHTTPError | TransportError):
        error = below  # the client has only said which file it was
    owner, text = name.partition("/")[0], _line(error)
    if isinstance(error, PublicThere):
        return (
            f"{name} is public on the hub, and hub.private is true",
            "make it private there or take another name",
        )
    if isinstance(error, HfHubHTTPError):
        status, text = error.response.status_code, _line(error.server_message or error)
    else:
        told = _STATUS.search(text)
        status = int(told[1]) if told else 0
    if status == 0 and isinstance(error, TimeoutError):
        return f"the hub took too long ({text})", "raise hub.timeout_s, or mend the network"
    if status == 0 and isinstance(error, TransportError | ConnectionError):
        return f"the hub does not answer ({text})", "mend the network or HF_ENDPOINT"
    right = f"set HF_TOKEN to one that may write to {owner}"
    if status == 401:
        return f"the hub refuses the token ({text})", right
    if status in (402, 413, 507) or (status == 403 and _ROOM.search(text)):
        return f"the hub has no room for it ({text})", f"make room there, or raise {owner}'s plan"
    if status == 403:
        return f"the hub forbids it ({text})", f"{right}, and see whether it has room there"
    if status == 429 or status >= 500:
        return f"the hub is in trouble ({status}: {text})", "wait until it is well"
    return f"{type(error).__name__}: {text}", "mend that"


def _line(said: object) -> str:
    return " ".join(str(said).split())


def _without_token(text: str) -> str:
    from huggingface_hub import get_token

    token = get_token()
    return text.replace(token, "***") if token else text
