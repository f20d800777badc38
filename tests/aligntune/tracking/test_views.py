"""Trackers are views of a run: what they do not take is told, tried again, and waits for nobody."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from aligntune.tracking import views
from aligntune.tracking.trackers import Ended
from aligntune.tracking.views import View


class Service:
    """A tracking service over HTTP, which can be stopped and started on the same port."""

    def __init__(self) -> None:
        self.taken: list[dict[str, Any]] = []
        self.port = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        taken = self.taken

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                taken.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


class Client:
    """The tracker of that service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def _post(self, **what: Any) -> None:
        url = f"http://127.0.0.1:{self._service.port}/"
        urllib.request.urlopen(url, json.dumps(what).encode(), timeout=10).close()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._post(step=step, **metrics)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._post(table=step)

    def truncate_after(self, step: int) -> None:
        self._post(forget=step)

    def close(self, ended: Ended) -> None:
        self._post(ended=ended)


class Told:
    """What a view says of its failures."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.first = threading.Event()

    def __call__(self, **fields: Any) -> None:
        self.events.append(fields)
        self.first.set()


@pytest.mark.slow
def test_figures_of_an_outage_are_told_once_and_sent_when_it_is_over() -> None:
    service, told = Service(), Told()
    with service.running():
        view = View("service", lambda: Client(service), told)
        view.log(1, {"x": 1.0})
        view.truncate_after(1)
        while len(service.taken) < 2:
            assert view._thread.is_alive()
    view.log(2, {"x": 2.0})
    assert told.first.wait(30)
    view.log(3, {"x": 3.0})
    with service.running():
        view.log(4, {"x": 4.0})
        view.close("stopped")
    steps = [{"step": step, "x": float(step)} for step in (1, 2, 3, 4)]
    assert service.taken == [steps[0], {"forget": 1}, *steps[1:], {"ended": "stopped"}]
    (event,) = told.events
    assert event["tracker"] == "service"
    assert "Connection refused" in event["reason"]


@pytest.mark.slow
def test_a_service_that_does_not_come_back_costs_the_end_nothing_but_an_event() -> None:
    service, told = Service(), Told()
    with service.running():
        pass
    view = View("service", lambda: Client(service), told)
    view.log(1, {"x": 1.0})
    view.close("finished")
    first, last = told.events
    assert "Connection refused" in first["reason"]
    assert last == {"tracker": "service", "reason": "1 steps were never taken"}


class NoTables:
    """A tracker whose service takes figures, and files only from step `since` on."""

    def __init__(self, since: float) -> None:
        self.taken: list[tuple[str, int]] = []
        self._since = since

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.taken.append(("log", step))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        if step < self._since:
            raise PermissionError("403, no files")
        self.taken.append(("table", step))

    def truncate_after(self, step: int) -> None: ...

    def close(self, ended: Ended) -> None: ...


@pytest.mark.parametrize("figures", [True, False])
def test_a_table_that_is_refused_holds_up_no_figures_and_is_told_once(figures: bool) -> None:
    tracker, told = NoTables(since=float("inf")), Told()
    view = View("service", lambda: tracker, told)  # type: ignore[arg-type, return-value]
    for step in (1, 2, 3):
        view.samples(step, [])
        if figures:
            view.log(step, {"x": 1.0})
            view.truncate_after(step)
    view.close("finished")
    assert tracker.taken == ([("log", step) for step in (1, 2, 3)] if figures else [])
    assert told.events == [{"tracker": "service", "reason": "PermissionError: 403, no files"}]


def test_tables_are_told_of_again_once_one_was_taken() -> None:
    tracker, told = NoTables(since=2), Told()
    view = View("service", lambda: tracker, told)  # type: ignore[arg-type, return-value]
    for step in (1, 2, 1):
        view.samples(step, [])
        view.log(step, {"x": 1.0})
    view.close("finished")
    steps = [("log", 1), ("table", 2), ("log", 2), ("log", 1)]
    assert (tracker.taken, len(told.events)) == (steps, 2)


def test_a_refused_table_of_a_step_that_was_rolled_back_is_not_tried_again_nor_told() -> None:
    tracker, told, given = NoTables(since=float("inf")), Told(), threading.Event()

    def opened() -> NoTables:
        assert given.wait(30)
        return tracker

    view = View("service", opened, told)  # type: ignore[arg-type, return-value]
    view.samples(5, [])
    view.truncate_after(3)
    view.log(4, {"x": 1.0})
    given.set()
    view.close("finished")
    assert (tracker.taken, told.events) == ([("log", 4)], [])


@pytest.mark.slow
def test_a_table_of_an_outage_is_sent_when_it_is_over() -> None:
    service, told = Service(), Told()
    with service.running():
        pass
    view = View("service", lambda: Client(service), told)
    view.samples(1, [])
    view.log(1, {"x": 1.0})
    assert told.first.wait(30)
    with service.running():
        view.log(2, {"x": 2.0})
        view.close("finished")
    steps = [{"step": step, "x": float(step)} for step in (1, 2)]
    assert service.taken == [{"table": 1}, *steps, {"ended": "finished"}]
    assert len(told.events) == 1


@pytest.mark.parametrize("where", ["open", "log", "close"])
def test_a_tracker_that_hangs_is_left_behind(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "CLOSE_SECONDS", 0.1)
    free, told = threading.Event(), Told()

    def hang(*_: Any) -> None:
        assert free.wait(60)

    class Hanging:
        log: Callable[..., None] = hang if where == "log" else lambda *_: None
        close: Callable[..., None] = hang if where == "close" else lambda *_: None

        def __init__(self) -> None:
            if where == "open":
                hang()

    view = View("service", Hanging, told)  # type: ignore[arg-type]
    view.log(1, {"x": 1.0})
    view.close("finished")
    free.set()
    assert told.events == [{"tracker": "service", "reason": "no end within 0.1 s"}]


class Slow:
    """A tracker that hangs in the first figures until it is `free`."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, int]] = []
        self.hangs, self.free = threading.Event(), threading.Event()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.hangs.set()
        assert self.free.wait(60)
        self.taken.append(("log", step))

    def truncate_after(self, step: int) -> None:
        self.taken.append(("forget", step))

    def close(self, ended: Ended) -> None: ...


def test_a_tracker_that_hangs_for_days_is_owed_a_bounded_number_of_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(views, "KEPT", 50)
    tracker, told = Slow(), Told()
    view = View("service", lambda: tracker, told)  # type: ignore[arg-type, return-value]
    view.log(0, {"x": 0.0})
    assert tracker.hangs.wait(30)
    for step in range(1, 151):
        view.log(step, {"x": float(step)})
        if step in (20, 30, 60):
            view.truncate_after(step - 15)
    tracker.free.set()
    view.close("finished")
    assert tracker.taken == [
        ("log", 0),  # what it hung in
        ("forget", 5),  # the furthest back of three
        *(("log", step) for step in range(102, 151)),
    ]
    assert len(tracker.taken) == 50 + 1
    (event,) = told.events
    assert event["reason"] == "101 steps were left out, for it was more than 50 behind"
