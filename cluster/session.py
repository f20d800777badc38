"""Connects to Ray, or starts it on this machine for the length of a run."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from cluster import local, proxies
from cluster.forks import owner
from cluster.specs import ClusterSpec

HIGHEST_PORT = 65535
ANSWER_S = 5.0  # longest wait for a head to take a connection


class ClusterUnreachable(RuntimeError):
    """No Ray cluster answers at the address the run was given."""


class RayTooSlow(ClusterUnreachable):
    """Ray did not start on this machine in time: that is no fault of what it was asked for."""


def connected_already() -> bool:
    """Whether this process has a Ray session; one that has not imported Ray has none."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def resolve_address(spec: ClusterSpec) -> str:
    """The address to use: what the spec says, or RAY_ADDRESS in place of 'local'."""
    if spec.address == "local":
        return os.environ.get("RAY_ADDRESS", "local")
    return spec.address


def check_answers(address: str) -> None:
    """Whether a gRPC server, as a head is one, answers at `host:port`; Ray would try for half a
    minute and say less.

    'local', 'auto' and addresses without a port are not tried.

    Raises ClusterUnreachable within twice `ANSWER_S` seconds.
    """
    if address.startswith(("http://", "https://")):
        raise ClusterUnreachable(
            f"{address!r} is the address of a Jobs server, and a run joins a head: send the run "
            f"with `aligntune submit --address {address}`, or name the head, as in HOST:6379, in "
            "cluster.address or RAY_ADDRESS"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    if int(port) > HIGHEST_PORT:  # a connection would go to what is left of it without its 17th bit
        raise ClusterUnreachable(
            f"{address!r} names port {port}, and {HIGHEST_PORT} is the highest there is; correct "
            "cluster.address or RAY_ADDRESS"
        )
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
    except OSError as error:
        raise ClusterUnreachable(
            f"nothing answers at {address!r}: {error}. Start a head there with `ray start --head "
            f"--port={port}`, or correct cluster.address or RAY_ADDRESS"
        ) from error
    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return  # a channel without its certificates would prove nothing
    import grpc
    from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS

    # As Ray itself: past the proxy of http_proxy, unless RAY_grpc_enable_http_proxy says otherwise.
    with grpc.insecure_channel(f"{host}:{port}", GLOBAL_GRPC_OPTIONS) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_S)
        except grpc.FutureTimeoutError as error:
            raise ClusterUnreachable(
                f"what listens at {address!r} is no Ray head, or one that hangs: it did not speak "
                f"gRPC within {ANSWER_S:g} s; the head's port is the one of `ray start --head "
                "--port`, 6379 unless set, not that of its dashboard"
                f"{_proxy_of_grpc(host)}"
            ) from error


def _proxy_of_grpc(host: str) -> str:
    """What to add where RAY_grpc_enable_http_proxy sends Ray through a proxy."""
    from ray._private.ray_constants import GRPC_ENABLE_HTTP_PROXY

    said = proxies.advice(f"http://{host}") if GRPC_ENABLE_HTTP_PROXY else ""
    return f"; {said}" if said else ""


def find_cluster() -> str:
    """The address that 'auto' stands for: RAY_ADDRESS, or that of the Ray started here last.

    Raises ClusterUnreachable where there is none.
    """
    from ray._private.services import get_ray_address_from_environment

    try:
        return str(get_ray_address_from_environment("auto", None))
    except ConnectionError as error:
        raise ClusterUnreachable(
            "cluster.address is auto, and no Ray runs on this machine; start one with `ray start`, "
            "set RAY_ADDRESS, or use cluster.address=local"
        ) from error


def check_head(address: str) -> None:
    """Whether the head at `host:port` takes us in, on a machine that is one of its nodes.

    Ray would try for half a minute, and end this process without a word where no node is here.
    'auto' is looked up first; 'local' and ray:// addresses are left to Ray.

    Raises ClusterUnreachable within three times `ANSWER_S` seconds.
    """
    if address == "auto":
        address = find_cluster()
    check_answers(address)
    if ":" not in address or "://" in address:
        return
    import psutil
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError, RpcError

    try:
        nodes = GcsClient(address=address).get_all_node_info(timeout=ANSWER_S)
    except (RpcError, AuthenticationError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ClusterUnreachable(
            f"{address} answers, but not as a Ray head that knows us: {reason[0]}; set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the cluster's token, or correct the "
            "address"
        ) from error
    alive = {node.node_manager_address for node in nodes.values() if node.state == 0}
    if not alive & {one.address for of in psutil.net_if_addrs().values() for one in of}:
        raise ClusterUnreachable(
            f"this machine is no node of the cluster at {address} (those are "
            f"{', '.join(sorted(alive)[:5])}); call this on one of them, or send the run there "
            "with `aligntune submit`"
        )


@contextmanager
def session(
    spec: ClusterSpec,
    *,
    cpus: float,
    imports: Sequence[str] = (),
) -> Iterator[str]:
    """A Ray session; yields the address. What it starts it stops.

    A Ray started here offers at least `cpus` logical processors, so that a laptop's roles can take
    turns on two cores; on a cluster that others share the reservation decides. Its workers are
    forked from one process that has the modules `imports` already.

    Raises ClusterUnreachable where nothing answers at the address.
    """
    address = resolve_address(spec)
    if connected_already():
        yield address  # the caller's own session, which stays the caller's
        return
    import ray

    check_head(address)
    if address == "local" and (trouble := local.socket_trouble()):
        raise ClusterUnreachable(trouble)
    with owner.server(imports if address == "local" else ()):
        _connect(address, spec, max(os.cpu_count() or 1, math.ceil(cpus)))
        _hear_sigterm_alone()
        try:
            yield address
        finally:
            ray.shutdown()


def _hear_sigterm_alone() -> None:
    """Leave SIGTERM to Python's handler. Ray puts one of its own before it, which aborts the
    process 3 s later, whatever it is at."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def _connect(address: str, spec: ClusterSpec, cpus: int) -> None:
    """Connect to the Ray at `address`, or start one with `cpus` logical processors where that is
    'local'. Raises ClusterUnreachable."""
    import ray

    logging.getLogger("ray").setLevel(logging.WARNING)
    # That a token is asked for is as it should be, and no warning to a person.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    common = {"log_to_driver": spec.worker_logs, "logging_level": logging.WARNING}
    try:
        if address == "local":
            store = spec.object_store_gib
            local.keep_token_private()
            unread = nullcontext() if spec.worker_logs else local.unread_logs()
            with local.alone(), unread, owner.workers():
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    object_store_memory=int(store * 2**30) if store else None,
                    **common,
                )
        else:
            ray.init(address=address, **common)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterUnreachable(
            f"no Ray cluster at {address!r}: {error}. Start one with `ray start --head`, correct "
            "cluster.address or RAY_ADDRESS, or use cluster.address=local"
        ) from error
    except Exception as error:
        if type(error) is not Exception:  # Ray's own, of processes that were too slow to start
            raise
        raise RayTooSlow(
            f"Ray did not start on this machine in time ({error}); it is overloaded or short of "
            "memory: try again, or end what takes it"
        ) from error
