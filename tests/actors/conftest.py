"""What the tests of actors share: one thread of torch, as their models are tiny."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Threads of a tiny model wait for each other more than they compute."""
    import torch

    torch.set_num_threads(1)
