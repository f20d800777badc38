"""A hub that does not answer is asked once, and what is missing then is said in one line."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from actors.models import hub
from actors.models.configuration import ModelError
from actors.models.hub import why_silent
from actors.models.loading import check_causal_lm, load_tokenizer
from actors.models.positions import model_positions
from actors.specs import ModelSpec
from aligntune.data.errors import DataError
from aligntune.data.sources import load_rows


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An address at which nobody listens, as the hub's."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and listens not
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        why_silent.cache_clear()
        yield address
    why_silent.cache_clear()


def test_a_silent_hub_is_tried_once_and_named(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    for ask in (check_causal_lm, load_tokenizer, model_positions):
        with pytest.raises(ModelError) as error:
            ask(ModelSpec(name="nobody/no-such-model"))
        said = str(error.value)
        assert said.startswith("model 'nobody/no-such-model' is not on this machine, and the hub")
        assert f"{silent} does not answer (ConnectError" in said
    with pytest.raises(DataError, match=r"nobody/no-such-data: is not on this machine"):
        load_rows("nobody/no-such-data", split="train")
    assert constants.HF_HUB_OFFLINE
    assert hub.why_silent.cache_info().misses == 1
    assert time.monotonic() - started < 30


def test_who_says_that_there_is_no_hub_is_not_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    why_silent.cache_clear()
    assert why_silent() is None
    with pytest.raises(ModelError, match="no usable configuration"):
        check_causal_lm(ModelSpec(name="nobody/no-such-model"))
