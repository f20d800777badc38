"""One tiny chat model, one folder of user code and one loop, for all tests here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.specs import ModelSpec
from tests.actors.environments.chat import make_model, make_tokenizer
from tests.actors.environments.user_code import MODULE


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def plain_tokenizer() -> Any:
    """One whose template writes every answer as it was given: without thinking."""
    from trl.chat_template_utils import qwen3_instruct_2507_chat_template

    return make_tokenizer(qwen3_instruct_2507_chat_template)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> ModelSpec:
    folder = tmp_path_factory.mktemp("chat") / "model"
    make_model(folder, tokenizer)
    return ModelSpec(name=str(folder))


@pytest.fixture(scope="session")
def user_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    (folder / "user_tools.py").write_text(MODULE)
    return folder


@pytest.fixture(scope="module")
def loop() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    """Runs coroutines, all on one event loop."""
    with asyncio.Runner() as runner:
        yield lambda work: runner.run(asyncio.wait_for(work, 240))
