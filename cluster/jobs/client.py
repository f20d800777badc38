"""Ray Jobs over the head's Jobs server: submit, follow, list, stop.

Invariants: every request has a time limit; what a job prints is written once, in order, whatever
happens to the connection; the value of a secret is in no message.
"""

from __future__ import annotations

import asyncio
import difflib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from cluster import proxies
from cluster.jobs import secrets
from cluster.jobs.packaging import Package

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 8.0  # with the above, an address that does not answer is told in 15 s
UPLOAD_SECONDS = 300.0  # for the server to store an archive, or to start a job's supervisor
KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPALIVE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
RECONNECT_SECONDS = 300.0
STOP_SECONDS = 600
"""Seconds that a job has to write its checkpoint before Ray kills it."""

# Ray reads where a client goes from these before it looks at what the client says.
REDIRECTS = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
TOKEN_ADVICE = (
    "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the file with the token that the cluster "
    "was started with"
)


class JobsError(RuntimeError):
    """A Jobs server did not do what it was asked; the message says what and the cure."""


class JobsUnreachable(JobsError):
    """Nothing that is a Jobs server answers at the address in time."""


class NotAuthorised(JobsError):
    """The cluster wants a token, and got none or another."""


class UnknownJob(JobsError):
    """No job has this id."""


class ConnectionLost(JobsError):
    """The log of a job could not be followed to its end; the job may still run."""


class _Client(JobSubmissionClient):
    """Ray's client, with a time limit on every request."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        slow = method in ("PUT", "POST")
        limits = (CONNECT_SECONDS, UPLOAD_SECONDS if slow else ANSWER_SECONDS)
        return super()._do_request(method, endpoint, timeout=limits, **options)


class Once:
    """Of a text that is sent again from its beginning at times, what has not been seen yet."""

    def __init__(self) -> None:
        self._seen = 0  # characters
        self._sent = 0

    def restart(self) -> None:
        """What comes next is the beginning of the text."""
        self._sent = 0

    def feed(self, chunk: str) -> str:
        """The unseen end of the next chunk."""
        known = max(0, min(len(chunk), self._seen - self._sent))
        self._sent += len(chunk)
        self._seen = max(self._seen, self._sent)
        return chunk[known:]


class Jobs:
    """The jobs of one cluster. `address` is the Jobs server's, as in http://HEAD:8265.

    Raises JobsUnreachable and NotAuthorised, here and in every method.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        logging.getLogger(JobSubmissionClient.__base__.__module__).setLevel(logging.WARNING)
        with self._errors(), _undirected():
            self._client = _Client(self.address)

    @property
    def ray_version(self) -> str:
        """The cluster's Ray."""
        return str(self._client._server_ray_version)

    def submit(
        self,
        entrypoint: str,
        package: Package,
        job_id: str,
        secret: Mapping[str, str],
        metadata: Mapping[str, str],
    ) -> None:
        """Upload the package, unless it is there, and start `entrypoint` in it on the head.

        The variables `secret` are set for the entrypoint and for every actor and task of the job,
        and are in no log. Where the job is refused they are erased; where the connection is lost as
        it is sent they stay, for it may have been taken.
        """
        env_vars = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
        runtime_env: dict[str, Any] = {
            "working_dir": str(package.archive),
            "env_vars": env_vars,
        }
        with self._errors():
            if secret:
                key = secrets.new_key()
                path = f"/api/packages/gcs/{key}"
                self._client._do_request("PUT", path, data=secrets.packed(secret))
                env_vars[secrets.VARIABLE] = key
                runtime_env["worker_process_setup_hook"] = secrets.HOOK
            try:
                self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=job_id,
                    runtime_env=runtime_env,
                    metadata=dict(metadata),
                )
            except RuntimeError:  # so the client tells that the server refuses
                if secret:  # it knows no way to delete them
                    self._client._do_request("PUT", path, data=secrets.ERASED)
                raise

    def all(self) -> list[JobDetails]:
        """The submitted jobs, oldest first."""
        with self._errors():
            jobs = [job for job in self._client.list_jobs() if job.submission_id]
        return sorted(jobs, key=lambda job: job.start_time or 0)

    def get(self, job_id: str) -> JobDetails:
        """One job. Raises UnknownJob with the nearest ids, or the last."""
        with self._errors(job_id):
            return self._client.get_job_info(job_id)

    def logs(self, job_id: str) -> str:
        """All that the job has printed."""
        with self._errors(job_id):
            return str(self._client.get_job_logs(job_id))

    def follow(
        self,
        job_id: str,
        write: Callable[[str], None],
        reconnect_s: float = RECONNECT_SECONDS,
        note: Callable[[str], None] = lambda text: None,
        log: Once | None = None,
    ) -> JobDetails:
        """`write` everything the job prints, once, until it has ended; returns how it did.

        A lost connection is made again, with a `note`; after `reconnect_s` seconds without one
        ConnectionLost is raised. A `log` that a former call was given goes on where that ended.
        """
        log = log or Once()
        lost_at: float | None = None
        while True:
            met, reason = asyncio.run(self._tail(job_id, log, write))
            lost_at = None if met else lost_at
            try:
                job = self.get(job_id)
                if job.status.is_terminal():
                    log.restart()
                    write(log.feed(self.logs(job_id)))  # what came after the connection ended
                    return job
            except JobsUnreachable as error:
                reason = reason or str(error)
            now = time.monotonic()
            if lost_at is None:
                lost_at = now
                note(f"connection to {self.address} lost ({reason or 'closed'}); trying again")
            if now - lost_at > reconnect_s:
                raise ConnectionLost(
                    f"no connection to {self.address} for {reconnect_s:g} s ({reason or 'closed'})"
                    f"; job {job_id} may still run"
                )
            time.sleep(min(5.0, 0.5 + (now - lost_at) / 4))

    async def _tail(self, job_id: str, log: Once, write: Callable[[str], None]) -> tuple[bool, str]:
        """Write the unseen log until the connection ends; whether there was one, and why it did."""
        import aiohttp

        log.restart()
        met = False
        url = f"{self._client._address}/api/jobs/{job_id}/logs/tail"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        try:
            async with (
                aiohttp.ClientSession(headers=self._client._headers, timeout=timeout) as session,
                session.ws_connect(url, max_msg_size=0) as following,
            ):
                met = True
                # The server answers no pings here, so it is for TCP to find out a dead connection.
                _keep_alive(following.get_extra_info("socket"))
                async for message in following:
                    if message.type is not aiohttp.WSMsgType.TEXT:
                        break
                    write(log.feed(message.data))
                return met, str(following.exception() or "")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return met, str(error) or type(error).__name__

    def stop(self, job_id: str, deadline_s: float = STOP_SECONDS + 30.0) -> JobDetails:
        """Ask the job to write its checkpoint and end, and wait until it has.

        Raises:
            JobsError: it has not ended within `deadline_s` seconds.
        """
        job = self.get(job_id)
        if job.status.is_terminal():
            return job
        with self._errors(job_id):
            self._client.stop_job(job_id)
        end = time.monotonic() + deadline_s
        while not (job := self.get(job_id)).status.is_terminal():
            if time.monotonic() > end:
                raise JobsError(
                    f"job {job_id} was asked to stop {deadline_s:g} s ago and is still "
                    f"{job.status}; Ray kills it {STOP_SECONDS} s after it was asked"
                )
            time.sleep(0.5)
        return job

    @contextmanager
    def _errors(self, job_id: str | None = None) -> Iterator[None]:
        """What goes wrong with a request, in one line."""
        import requests

        try:
            yield
        except AuthenticationError as error:
            if "Authentication failed" in str(error):
                raise NotAuthorised(
                    f"{self.address} refuses this token: it is not the cluster's; {TOKEN_ADVICE}"
                ) from error
            raise NotAuthorised(f"{self.address} wants a token; {TOKEN_ADVICE}") from error
        except (requests.RequestException, ConnectionError, OSError) as error:
            raise JobsUnreachable(
                f"no Ray Jobs server answers at {self.address} ({_innermost(error)}); give the "
                "address of the head, as in http://HEAD:8265, see that its dashboard runs and that "
                f"the port is open from here{self._proxy()}"
            ) from error
        except (RuntimeError, ValueError) as error:
            if job_id is not None and "does not exist" in str(error):
                raise UnknownJob(self._unknown(job_id)) from error
            raise JobsError(f"{self.address}: {_short(str(error))}{self._proxy()}") from error

    def _proxy(self) -> str:
        return f"; {advice}" if (advice := proxies.advice(self.address)) else ""

    def _unknown(self, job_id: str) -> str:
        known = [job.submission_id for job in self.all()]
        return f"no job {job_id!r} at {self.address}; {nearest_ids(job_id, known)}"


def nearest_ids(job_id: str, known: Sequence[str]) -> str:
    """The ids nearest to one that is not there, or the last ones. Pure."""
    if close := difflib.get_close_matches(job_id, known, n=3, cutoff=0.6):
        return f"did you mean {' or '.join(close)}?"
    return f"the last are {', '.join(known[-3:])}" if known else "no job was ever submitted there"


def exit_code(job: JobDetails) -> int:
    """What the entrypoint returned; 143 for a job that was stopped, 1 where it never started."""
    match job.status:
        case JobStatus.SUCCEEDED:
            return 0
        case JobStatus.STOPPED:
            return 143
    return 1 if job.driver_exit_code is None else int(job.driver_exit_code)


def _innermost(error: BaseException) -> str:
    """What a failed connection comes from, in one short line."""
    while isinstance(error.__context__, Exception):
        error = error.__context__
    return _short(str(error)) or type(error).__name__


def _short(text: str) -> str:
    """The first line and, as in a server's traceback, the last one."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    shown = " ... ".join(dict.fromkeys([*lines[:1], *lines[-1:]]))
    return shown if len(shown) <= 400 else f"{shown[:400]}..."


def _keep_alive(connection: Any) -> None:
    """Let the operating system end a connection on which nothing is answered for 30 s."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():  # not every system has every one
        if (option := getattr(socket, name, None)) is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


@contextmanager
def _undirected() -> Iterator[None]:
    """Without the variables that send every client elsewhere than it says."""
    kept = {name: os.environ.pop(name) for name in REDIRECTS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
