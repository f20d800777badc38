"""How the workers of a job over a table meet: bound first to the interface of their route."""

from __future__ import annotations

import os
import socket
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import ray

from actors.preference.meeting import RoutedTorchConfig
from actors.strategies import process_group
from actors.strategies.process_group import bind_to_route

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
Address = namedtuple("Address", "address")


class Workers:
    """Two workers as Ray Train's backend sees them; keeps what they were told to do, in order."""

    def __init__(self) -> None:
        self.done: list[tuple[str, Any]] = []

    def __len__(self) -> int:
        return 2

    def execute(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self.done.append((function.__name__, args))

    def execute_single(self, rank: int, function: Callable[..., Any]) -> Any:
        several = function.__name__ == "get_address_and_port"
        return ("10.0.0.7", 1234) if several else "10.0.0.7"

    def execute_single_async(self, rank: int, function: Callable[..., Any], **_: Any) -> None:
        self.done.append((function.__name__, rank))


def test_workers_are_bound_to_the_route_before_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda calls: calls)
    config = RoutedTorchConfig(backend="gloo")
    workers = Workers()
    config.backend_cls().on_start(workers, config)
    assert workers.done[0] == ("bind_to_route", ("10.0.0.7",))
    joined = [step for step in workers.done if step[0] == "_setup_torch_process_group"]
    assert joined == [(joined[0][0], 0), (joined[0][0], 1)]


@pytest.mark.parametrize(("own", "family"), [("10.0.0.8", "AF_INET"), ("fd00::8", "AF_INET6")])
def test_the_interface_is_the_one_with_the_address_that_reaches_rank_0(
    monkeypatch: pytest.MonkeyPatch, own: str, family: str
) -> None:
    class Probe:
        def __init__(self, made: int, kind: int) -> None:
            assert made == getattr(socket, family)

        def __enter__(self) -> Probe:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def connect(self, address: tuple[str, int]) -> None:
            assert address[0] == own[:-1] + "7"

        def getsockname(self) -> tuple[str, int]:
            return own, 1

    cards = {"docker0": ["172.17.0.1"], "lo": ["127.0.0.1"], "eth1": ["aa:bb", own]}
    found = {name: [Address(one) for one in every] for name, every in cards.items()}
    monkeypatch.setattr(process_group.socket, "socket", Probe)
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what is set below is undone
        del os.environ[name]
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    bind_to_route(own[:-1] + "7")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth1"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "ib0", "what the user sets stays"


def test_this_machines_own_address_has_an_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        del os.environ[name]
    bind_to_route("127.0.0.1")
    assert {os.environ[name] for name in VARIABLES} <= set(psutil.net_if_addrs())
