"""Dask clusters to run on: one of this machine's cores or GPUs, or one that is there already, reached safely.

Whoever reaches the port of a Dask scheduler or worker runs code there. A cluster of one's own therefore listens on
loopback only, and a scheduler elsewhere is talked to by TLS or not at all.
"""

import contextlib
import ipaddress
import json
import logging
import multiprocessing
import os
import signal
import socket
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from quadmix_plugin.errors import QuadmixError, RecipeError

if TYPE_CHECKING:
    from distributed.security import Security

logger = logging.getLogger(__name__)

# Worker processes are the parallelism, so libraries get one thread each (tokenizers their share of the cores). glibc's
# default thresholds return large arrays to the system after every use: torch trains at little more than half the speed
# then.
_WORKER_ENV = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 29),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 29),
    "LOGURU_LEVEL": "WARNING",
}
_GUARD = 'put the script under `if __name__ == "__main__":`'
_ENCRYPTED = ("tls", "wss")
_LOOPBACK = "127.0.0.1"
_SECONDS_OF_WORK = "1s"  # per worker, above which an adaptive cluster grows; units under way are few
_TLS_FILES = ("ca", "cert", "key")


@dataclass(frozen=True)
class Tls:
    """The certificate files of a cluster; without them Dask's own configuration says where they are."""

    ca: str | None = None
    cert: str | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        given = {name: path for name in _TLS_FILES if (path := getattr(self, name)) is not None}
        if given and len(given) < len(_TLS_FILES):
            missing = next(name for name in _TLS_FILES if name not in given)
            raise RecipeError(f"executor.tls_{missing}: missing; TLS needs tls_ca, tls_cert and tls_key together")
        for name, path in given.items():
            if not os.access(path, os.R_OK):
                raise RecipeError(f"executor.tls_{name}: {path}: no such file, or not readable; give a PEM file")

    def security(self, address: str) -> "Security":
        """What a client of ``address`` presents and checks.

        Raises:
            RecipeError: the address needs certificates and none are named, or they are not valid.
        """
        from distributed.security import Security

        is_given = self.ca is not None
        files = {"tls_ca_file": self.ca, "tls_client_cert": self.cert, "tls_client_key": self.key}
        security = Security(**(files | {"require_encryption": True} if is_given else {}))
        if not address.startswith("tls://"):
            return security
        if security.tls_ca_file is None:
            raise RecipeError(
                f"executor: {address} wants TLS and no certificates are named; give tls_ca, tls_cert and tls_key, or "
                "set distributed.comm.tls in Dask's configuration"
            )
        try:
            security.get_connection_args("client")
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise RecipeError(f"executor.tls_ca, tls_cert, tls_key: not usable ({error}); give PEM files") from error
        return security


def check_address(address: str, place: str = "executor.address") -> None:
    """Refuses a scheduler that could only be reached in the clear over a network.

    Raises:
        RecipeError: no address of a scheduler, or one off loopback without TLS.
    """
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:  # such as a bracket that is not closed, or a port beyond 65535
        parts, port = urlsplit(""), None
    if not parts.scheme or not parts.hostname or port is None:
        raise RecipeError(f"{place}: {address!r} is no address of a Dask scheduler; give one such as tls://host:8786")
    if parts.scheme in _ENCRYPTED or _is_loopback(parts.hostname):
        return
    raise RecipeError(
        f"{place}: {address} is reached over a network without TLS, where anyone who reaches that port runs code; "
        "start the scheduler and its workers with --tls-ca-file, --tls-cert and --tls-key, and give tls://… "
        "(docs/clusters.md)"
    )


def _is_loopback(host: str) -> bool:
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):  # not known here, or no name of a host: not this machine
        return False
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)


@dataclass(frozen=True)
class Scheduler:
    """A Dask scheduler that is there already, by its address or by the file that it writes (``--scheduler-file``)."""

    address: str | None = None
    file: str | None = None
    tls: Tls = field(default_factory=Tls)

    def __post_init__(self) -> None:
        if self.address and self.file:
            raise RecipeError("executor.scheduler_file: an address is given too; leave one of them out")
        if self.address:
            check_address(self.address)

    @contextlib.contextmanager
    def client(self) -> Iterator[Any]:
        """A connected client.

        Raises:
            RecipeError: the file holds no address, or one off loopback without TLS; certificates are missing.
            QuadmixError: no scheduler answers there.
        """
        from distributed import Client

        address = self.address or self._address_in_file()
        security = self.tls.security(address)
        try:
            client = Client(address, set_as_default=False, security=security)
        except (OSError, RuntimeError, TimeoutError) as error:
            raise QuadmixError(
                f"executor: no Dask scheduler at {address} ({error}); check the address, and that it runs"
            ) from error
        with client:
            yield client

    def _address_in_file(self) -> str:
        place = "executor.scheduler_file"
        try:
            content = json.loads(Path(self.file or "").read_text(encoding="utf-8"))
            address = content["address"]
        except FileNotFoundError as error:
            raise RecipeError(
                f"{place}: {self.file}: no such file; start the scheduler with --scheduler-file"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecipeError(f"{place}: {self.file}: not a file of a Dask scheduler ({error!r})") from error
        check_address(str(address), f"{place}: {self.file}")
        return str(address)


@dataclass(frozen=True)
class OwnCluster:
    """Worker processes on this machine that listen on loopback only: one per core, or one per GPU.

    With ``max_workers`` Dask starts and stops workers between ``n_workers`` and so many, as there is work.
    """

    n_workers: int | None = None
    max_workers: int | None = None
    threads_per_worker: int = 1
    memory_limit: str | int | float = "auto"
    env: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, float] = field(default_factory=dict)
    lost_worker_retries: int = 3
    gpu_workers: bool = False
    rmm_pool_size: str | int | float | None = None
    protocol: str = "tcp"

    def __post_init__(self) -> None:
        if self.max_workers is not None and self.gpu_workers:
            raise RecipeError("executor.max_workers: with one worker per GPU their number is that of the GPUs")
        if self.max_workers is not None and self.max_workers < (self.n_workers or 1):
            raise RecipeError(f"executor.max_workers: {self.max_workers} is less than workers, {self.n_workers}")
        if not self.gpu_workers and (self.rmm_pool_size is not None or self.protocol != "tcp"):
            key = "protocol" if self.rmm_pool_size is None else "rmm_pool_size"
            raise RecipeError(f"executor.{key}: only for one worker per GPU; needs dask-cuda and device: cuda")
        if self.protocol == "ucx" and find_spec("distributed_ucxx") is None:
            raise RecipeError("executor.protocol: ucx needs the package distributed-ucxx-cu12; install it, or use tcp")

    @contextlib.contextmanager
    def client(self) -> Iterator[Any]:
        """A client of the workers, which end with it.

        Raises:
            QuadmixError: the workers do not start.
        """
        from distributed import Client

        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise QuadmixError(f"executor: a worker process runs the script again; {_GUARD}")
        with contextlib.ExitStack() as stack:
            try:
                cluster = stack.enter_context(self._started())
                client = stack.enter_context(Client(cluster, set_as_default=False))
            except (OSError, RuntimeError, TimeoutError) as error:
                raise QuadmixError(f"executor: the Dask workers did not start ({error}); {_GUARD}") from error
            yield client

    @property
    def most_threads(self) -> int:
        """Threads of all workers once an adaptive cluster has grown; 1 otherwise."""
        return (self.max_workers or 1) * self.threads_per_worker

    @contextlib.contextmanager
    def _started(self) -> Iterator[Any]:
        from dask import config as dask_config
        from dask.system import CPU_COUNT

        n_workers = self.n_workers or (1 if self.max_workers else CPU_COUNT)
        env = {**_WORKER_ENV, **self.env}
        if (self.max_workers or n_workers) < CPU_COUNT:  # a GPU's one worker must not wait for its tokenizer
            env |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(CPU_COUNT // n_workers)} | dict(self.env)
        config = {
            "distributed.nanny.pre-spawn-environ": env,
            "distributed.scheduler.allowed-failures": self.lost_worker_retries,
            # A lost worker that takes longer to start again would be given up by the cluster, and with it its place.
            "distributed.deploy.lost-worker-timeout": "10 minutes",
            # What is under way is bounded, and spilled. A worker that Dask pauses then waits for ever for memory that
            # is the process' own; one that is ended at 95 % of its limit is a lost worker, which has its rule.
            "distributed.worker.memory.pause": False,
        }
        # A worker's environment passes through this process' own (Dask starts workers that way): put it back.
        before = {key: os.environ.get(key) for key in (*env, "PYTHONHASHSEED")}
        scratch = tempfile.TemporaryDirectory(prefix="quadmix-dask-", ignore_cleanup_errors=True)
        try:
            with scratch, dask_config.set(config), contextlib.ExitStack() as stack:
                with _sigint_blocked():
                    cluster = self._cluster(n_workers, scratch.name)
                stack.enter_context(_killed_if_late(cluster))
                stack.enter_context(cluster)
                if self.max_workers is not None:
                    cluster.adapt(minimum=n_workers, maximum=self.max_workers, target_duration=_SECONDS_OF_WORK)
                yield cluster
        finally:
            for key, value in before.items():
                if value is None:
                    os.environ.pop(key, None)
                else:
                    os.environ[key] = value

    def _cluster(self, n_workers: int, scratch: str) -> Any:
        from distributed import LocalCluster

        options: dict[str, Any] = {
            "threads_per_worker": self.threads_per_worker,
            "memory_limit": self.memory_limit,
            "host": _LOOPBACK,
            "dashboard_address": f"{_LOOPBACK}:0",
            "local_directory": scratch,
            "resources": dict(self.resources),
        }
        if not self.gpu_workers:
            return LocalCluster(n_workers=n_workers, **options)
        from dask_cuda import LocalCUDACluster  # pyright: ignore[reportMissingImports]  the extra cuda12

        return LocalCUDACluster(n_workers=self.n_workers, **options, **self._gpu_options())

    def _gpu_options(self) -> dict[str, Any]:
        """Options of ``LocalCUDACluster``: the pool serves cupy; torch keeps its own allocator, which reports OOM."""
        options: dict[str, Any] = {"protocol": self.protocol}
        if self.rmm_pool_size is not None:
            options |= {"rmm_pool_size": self.rmm_pool_size, "rmm_allocator_external_lib_list": ["cupy"]}
        return options


def dashboard(client: Any) -> str:
    """Where a client's cluster shows what it is doing."""
    if find_spec("bokeh") is None:
        return f"{client.dashboard_link} (once `pip install bokeh` has been run where the scheduler is)"
    return client.dashboard_link


@contextlib.contextmanager
def _killed_if_late(cluster: Any) -> Iterator[None]:
    """Kills a cluster's workers that do not end in time, on a machine with much else to do: their work is written."""
    try:
        yield
    except TimeoutError:
        logger.info("the Dask workers did not end in time and are killed")
        for nanny in cluster.workers.values():
            with contextlib.suppress(AttributeError, ProcessLookupError, TypeError):  # one that has ended
                os.kill(nanny.process.process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Processes and threads started here never see SIGINT: Ctrl-C in a terminal is for the driver alone to handle."""
    resource_tracker.ensure_running()  # started later, it would unblock the signal in the thread that starts workers
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
