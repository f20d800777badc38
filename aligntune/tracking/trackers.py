"""Trackers behind one protocol: TensorBoard, Weights & Biases, MLflow, Trackio, Prometheus.

metrics.jsonl is the record of a run; these are views of it. A run that goes on from a checkpoint
goes on with the same run of the tracker, whose identity lies in the run directory. TensorBoard
forgets the steps that were rolled back; the services, which keep what they were sent, show them
twice.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from aligntune.config.ignored import is_set
from aligntune.config.records import TrackingSpec
from aligntune.errors import UserError
from aligntune.runs.disk import write_atomically
from aligntune.tracking.tables import markdown, table

Rows = Sequence[Mapping[str, Any]]
Ended = Literal["finished", "stopped", "failed"]
"""How a run ended: at its last step, by a signal or on demand, or by an error."""


class TrackerMissing(ValueError):
    """A tracker was asked for whose package is not installed."""


class Tracker(Protocol):
    """Where the figures of each step also go."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The figures of `step`, all finite."""

    def samples(self, step: int, rows: Rows) -> None:
        """Groups of an evaluation at `step`, as in samples.jsonl."""

    def truncate_after(self, step: int) -> None:
        """Steps after `step` were rolled back and will come again."""

    def close(self, ended: Ended) -> None:
        """Send what is buffered, and say how the run ended where the service keeps that."""


MODULES = {"prometheus": "ray.util.metrics"}  # the others are called as their packages are
EXTRAS = ("wandb", "mlflow", "trackio")  # each is an extra of this package
NAMED = ("project", "name", "group", "tags", "entity")  # settings that services alone take


def check_trackers(names: Sequence[str]) -> None:
    """Import what the trackers need, before anything starts.

    Raises:
        TrackerMissing: naming the package and how to get it.
    """
    for name in names:
        try:
            importlib.import_module(MODULES.get(name, name))
        except ImportError as error:
            raise TrackerMissing(
                f"tracking.trackers asks for {name!r}, which cannot be imported ({error}); "
                f"{_install(name)}, or take it out"
            ) from error


def _install(name: str) -> str:
    """What installs a tracker; the extra names the versions that were tried."""
    return f"pip install {name} (the extra {name!r})" if name in EXTRAS else f"pip install {name}"


def check_settings(tracking: TrackingSpec) -> None:
    """Refuse settings that no chosen tracker takes. Raises UserError."""
    for key in NAMED:
        takers = ("wandb",) if key == "entity" else EXTRAS
        if is_set(tracking, key) and not {*takers} & {*tracking.trackers}:
            raise UserError(
                f"tracking.{key} is for {', '.join(takers)}, and tracking.trackers names none of "
                "them, so it would be ignored; add one, or remove it"
            )


def open_tracker(
    name: str, folder: Path, tracking: TrackingSpec, config: Mapping[str, Any], after_step: int
) -> Tracker:
    """Tracker `name`, for the run in `folder`, whose next step is `after_step` + 1.

    Raises TrackerMissing, or what its service raises.
    """
    check_trackers([name])
    if name == "tensorboard":
        return TensorBoard(folder / "tensorboard", after_step)
    if name == "prometheus":
        return Prometheus(folder.name)
    return SERVICES[name](folder, tracking, config)


_NAMING = threading.Lock()


def tracking_id(folder: Path) -> str:
    """What names the run in `folder` to tracking services, the same in each tracker's thread; made
    at the first call, and anew where a crash has left an empty file."""
    path = folder / "tracking_id"
    with _NAMING:
        name = path.read_text(encoding="utf-8").strip() if path.exists() else ""
        if not name:
            name = uuid.uuid4().hex[:16]
            write_atomically(path, name + "\n")
        return name


_EVENTS = "events.out.tfevents."  # how TensorBoard begins a file's name


class TensorBoard:
    """Event files in `folder`."""

    def __init__(self, folder: Path, after_step: int) -> None:
        self._folder = folder
        self._writer = self._open(after_step)

    def _open(self, after_step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        # Files are read in the order of their names: the second, then a count as text, 10 before 9.
        newest = max((path.name for path in self._folder.glob(f"{_EVENTS}*")), default="")
        while newest.startswith(f"{_EVENTS}{int(time.time()):010d}."):
            time.sleep(0.02)
        # purge_step: TensorBoard hides what earlier files hold of this step and later ones.
        return SummaryWriter(str(self._folder), purge_step=after_step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One scalar a figure."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def samples(self, step: int, rows: Rows) -> None:
        """A text."""
        self._writer.add_text("samples", markdown(*table(step, rows)), step)
        self._writer.flush()

    def truncate_after(self, step: int) -> None:
        """Go on in a new file that hides the later steps."""
        self._writer.close()
        self._writer = self._open(step)

    def close(self, ended: Ended) -> None:
        """Close the event file."""
        self._writer.close()


def gauge_name(metric: str, taken: Collection[str] = ()) -> str:
    """A metric's name as a gauge, with a number behind it where that is `taken`, as by `a_b` of
    `a-b`; Ray puts `ray_` before it when it exports it."""
    plain = "aligntune_" + re.sub(r"[^a-zA-Z0-9_]", "_", metric)
    numbered = (f"{plain}_{number}" for number in itertools.count(2))
    return next(name for name in itertools.chain([plain], numbered) if name not in taken)


class Prometheus:
    """Gauges that Ray exports on every node's metrics port; Prometheus scrapes them there.

    A gauge shows the latest step, so there is nothing to take back after a rollback.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Any] = {}
        self._taken: set[str] = set()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One gauge a figure, and one for the step itself."""
        from ray.util.metrics import Gauge

        for name, value in {"step": float(step), **metrics}.items():
            if name not in self._gauges:
                gauge_is = gauge_name(name, self._taken)
                self._taken.add(gauge_is)
                gauge = Gauge(gauge_is, f"{name} of the latest step", ("run",))
                self._gauges[name] = gauge.set_default_tags({"run": self._run})
            self._gauges[name].set(value)

    def samples(self, step: int, rows: Rows) -> None:
        """Gauges have no texts."""

    def truncate_after(self, step: int) -> None:
        """The next step overwrites."""

    def close(self, ended: Ended) -> None:
        """Ray exports what was set last, until the run's process ends."""


EXIT_CODES: Mapping[Ended, int] = {"finished": 0, "stopped": 255, "failed": 1}
"""By which W&B knows how a run ended; 255 is its own for Ctrl-C."""


class WandB:
    """Weights & Biases. `step` is a figure of its own, as W&B's counter cannot go back."""

    def __init__(self, folder: Path, tracking: TrackingSpec, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            entity=tracking.entity,
            project=tracking.project,
            name=tracking.name or folder.name,
            group=tracking.group,
            tags=tracking.tags or None,
            id=tracking_id(folder),
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row."""
        self._run.log({**metrics, "step": step})

    def samples(self, step: int, rows: Rows) -> None:
        """A table of its own each time: W&B keeps them side by side."""
        import wandb

        columns, lines = table(step, rows)
        self._run.log({"samples": wandb.Table([*columns], lines), "step": step})

    def truncate_after(self, step: int) -> None:
        """Rows that were sent stay."""

    def close(self, ended: Ended) -> None:
        """Finish the upload."""
        self._run.finish(exit_code=EXIT_CODES[ended])


STATUSES: Mapping[Ended, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
"""MLflow's names for how a run ended."""
LONGEST = 250  # characters of a name at MLflow


def mlflow_name(metric: str, among: Collection[str] = ()) -> str:
    """A metric's name as MLflow takes it, another one for each metric.

    MLflow takes letters, digits and `/_-.: `, no part of a path that is empty, `.` or `..`, and 250
    characters. Another character, and `:`, is its number between colons, as in `len:3c:50`. Its
    file store has a file for each metric, in folders by the parts of its name. A folder that would
    have the place of the file of a metric of `among` begins with `::`: beside `loss`,
    `loss/router` is `::loss/router`.
    """
    given = metric.split("/")
    taken = ("/".join(given[:place]) in among for place in range(1, len(given)))
    marks = ["::" if is_taken else "" for is_taken in taken]
    name = "/".join(mark + _spelled(part) for mark, part in zip([*marks, ""], given, strict=True))
    if len(name) <= LONGEST:
        return name
    digest = hashlib.sha256(metric.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{name[: LONGEST - 17]}-{digest}"


def _spelled(part: str) -> str:
    return re.sub(r"\." if part in (".", "..") else r"[^\w.\- ]", _escaped, part) or "::"


def _escaped(character: re.Match[str]) -> str:
    return f":{ord(character[0]):x}:"


class MLflow:
    """MLflow, at its configured tracking URI. The experiment is the project."""

    def __init__(self, folder: Path, tracking: TrackingSpec, config: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient

        self._names: set[str] = set()  # of figures, so far
        self._config: dict[str, Any] | None = None  # what may not be there yet
        self._client = MlflowClient()
        experiment = self._client.get_experiment_by_name(tracking.project)
        experiment_id = (
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(tracking.project)
        )
        name = tracking_id(folder)
        found = self._client.search_runs([experiment_id], f"tags.aligntune_id = '{name}'")
        if found:
            self._run_id = found[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            # A start of before, or a try of this one, may have failed at it. It goes with a file
            # that may be refused, so that a service which takes no files gets the figures.
            self._config = dict(config)
            return
        run = self._client.create_run(
            experiment_id,
            run_name=tracking.name or folder.name,
            tags={
                "aligntune_id": name,
                **({"group": tracking.group} if tracking.group else {}),
                **dict.fromkeys(tracking.tags, "true"),
            },
        )
        self._run_id = run.info.run_id
        self._client.log_dict(self._run_id, dict(config), "config.json")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """All figures in one request."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._names |= metrics.keys()
        named = {mlflow_name(name, self._names): value for name, value in metrics.items()}
        figures = [Metric(name, value, now, step) for name, value in named.items()]
        self._client.log_batch(self._run_id, metrics=figures)

    def samples(self, step: int, rows: Rows) -> None:
        """A file of the step, as `MlflowClient.load_table` and MLflow's page take the newest one.

        Its own `log_table` fetches a table to append to it, or makes a tag that grows until it is
        too long.
        """
        self._describe()
        columns, lines = table(step, rows)
        path = f"samples/step-{step:06d}.json"
        self._client.log_dict(self._run_id, {"columns": columns, "data": lines}, path)
        newest = json.dumps([{"path": path, "type": "table"}])
        self._client.set_tag(self._run_id, "mlflow.loggedArtifacts", newest)

    def truncate_after(self, step: int) -> None:
        """Figures that were sent stay."""

    def close(self, ended: Ended) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self._run_id, STATUSES[ended])
        self._describe()

    def _describe(self) -> None:
        if self._config is not None:
            self._client.log_dict(self._run_id, self._config, "config.json")
            self._config = None


class Trackio:
    """Trackio, in its local store."""

    def __init__(self, folder: Path, tracking: TrackingSpec, config: Mapping[str, Any]) -> None:
        import trackio

        self._run = trackio.init(
            project=tracking.project,
            name=f"{tracking.name or folder.name}-{tracking_id(folder)}",
            group=tracking.group,
            resume="allow",
            config={**config, "tags": tracking.tags} if tracking.tags else dict(config),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row."""
        self._run.log(dict(metrics), step=step)

    def samples(self, step: int, rows: Rows) -> None:
        """A table of the step."""
        import trackio

        columns, lines = table(step, rows)
        self._run.log({"samples": trackio.Table(columns=columns, data=lines)}, step=step)

    def truncate_after(self, step: int) -> None:
        """Rows that were sent stay."""

    def close(self, ended: Ended) -> None:
        """Write out what is buffered."""
        self._run.finish()


SERVICES: dict[str, Callable[[Path, TrackingSpec, Mapping[str, Any]], Tracker]] = {
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}
