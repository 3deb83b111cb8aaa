"""Ray itself: starting one, joining one, finding a system's kernel in it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any

import ray
from pydantic import BaseModel
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llmos.drivers.errors import LlmosError
from llmos.kernel import nodes
from llmos.kernel.remote import Handle
from llmos.kernel.server import KernelServer
from llmos.kernel.settings import Settings
from llmos.kernel.system import SystemConfig
from llmos.kernel.workers import CONCURRENCY, MEMORY_BYTES, NAMESPACE

OBJECT_STORE_BYTES = 256 << 20
"""Of a Ray that we start: messages are small, weights never go through it."""


class ClusterError(LlmosError):
    """Ray cannot be started, joined or found."""


class RunFile(BaseModel):
    """``<runs>/<system>/kernel.json``: where the running kernel is."""

    system: str
    address: str
    pid: int
    """The process that ends with the kernel; 0 if it is detached in a cluster."""
    started: int = 0
    """When that process started, as :func:`started_at` tells it: numbers of processes come
    again, and another process of that number must not be taken for the kernel."""
    token: Path | None = None
    """File with the token of a Ray that LLM OS started; None: Ray's own settings count."""

    @staticmethod
    def path(settings: Settings, system: str) -> Path:
        """Where it stands."""
        return settings.runs_dir / system / "kernel.json"

    def write(self, settings: Settings) -> None:
        """Write it in one step.

        Raises:
            SettingsError, ClusterError: it cannot be written.
        """
        path = self.path(settings, self.system)
        settings.make_folders(self.system)
        part = path.with_suffix(f".{os.getpid()}")
        try:
            part.write_text(self.model_dump_json())
            part.replace(path)
        except OSError as error:
            raise ClusterError(f"The address of the kernel cannot be kept: {error}") from None

    @property
    def alive(self) -> bool:
        """Whether its process is still there; of a detached kernel only its cluster knows."""
        return self.pid == 0 or started_at(self.pid) == self.started

    @classmethod
    def find(cls, settings: Settings, system: str | None) -> RunFile:
        """The running kernel of that name, or the only one there is.

        Raises:
            ClusterError: none runs, or several do and none was named.
        """
        pattern = f"{system or '*'}/kernel.json"
        found: dict[str, RunFile] = {}
        for path in sorted(settings.runs_dir.glob(pattern)):
            try:
                file = cls.model_validate(json.loads(path.read_text()))
            except (OSError, ValueError):
                continue
            if file.alive:
                found[file.system] = file
                continue
            # Left by a process that was killed. In a folder that we may only read it stays.
            with contextlib.suppress(OSError):
                path.unlink()
        if not found:
            name = f" of system {system!r}" if system else ""
            raise ClusterError(f"No kernel{name} is running", remedy="Start one: llmos up FILE")
        if len(found) > 1:
            raise ClusterError(
                f"Several kernels are running: {', '.join(found)}",
                remedy="Name one with --system",
            )
        return next(iter(found.values()))


def started_at(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine did; None: it has ended.

    With the number of the process this names it for as long as the machine runs. A zombie has
    ended: nobody may ever wait for it, as in a container whose first process does not.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name, in brackets, may hold spaces and brackets. After it come field 3 and the rest.
    state, *rest = stat.rpartition(")")[2].split()
    return None if state in ("Z", "X") else int(rest[18])


class Token:
    """Ray's token authentication, switched on for a Ray of our own.

    Ray gives a cluster that it starts a token, but a process that joins by address is
    expected to have been told so by its environment. It reads that when it is imported,
    so it has to be told to read it again.
    """

    _NAMES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")

    def __init__(self, path: Path) -> None:
        self.path = path
        self._before = {name: os.environ.get(name) for name in self._NAMES}

    def use(self) -> None:
        """Make this process and its children use the token; make one if there is none."""
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(f".{os.getpid()}")
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32))
            # The first of two that start at once wins; both then read the same token.
            with contextlib.suppress(FileExistsError):
                os.link(part, self.path)
            part.unlink()
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(self.path)
        self._reread()

    def forget(self) -> None:
        """Put the environment back."""
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._reread()

    @staticmethod
    def _reread() -> None:
        # There is no public call for it; ray.init does the same for a cluster it starts.
        raylet: Any = ray._raylet
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


class Cluster:
    """This process's connection to Ray."""

    def __init__(self, temp: Path | None, token: Token | None) -> None:
        self._temp = temp
        self._token = token

    @property
    def token(self) -> Path | None:
        """File with the token, where we set one."""
        return self._token.path if self._token is not None else None

    @property
    def joined(self) -> bool:
        """Whether this Ray was there before us, and will be after."""
        return self._temp is None

    @property
    def address(self) -> str:
        """``host:port`` of Ray's control store."""
        return str(ray.get_runtime_context().gcs_address)

    @classmethod
    def start(
        cls, settings: Settings, address: str | None = None, token: Path | None = None
    ) -> Cluster:
        """Join the cluster at ``address`` or ``RAY_ADDRESS``; without either start one here.

        Inside a ``ray job submit`` job Ray sets ``RAY_ADDRESS``, so a job joins its cluster.

        Raises:
            ClusterError: this process is connected already, Ray does not answer, or its
                files cannot be written.
        """
        if ray.is_initialized():
            raise ClusterError(
                "This process is connected to Ray already", remedy="Call ray.shutdown() first"
            )
        common: dict[str, Any] = {
            "namespace": NAMESPACE,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
        }
        target = address or settings.ray_address
        if not target:
            token = settings.home / "ray-token"
        authentication = Token(token) if token is not None else None
        try:
            if authentication is not None:
                authentication.use()
            if target:
                ray.init(address=target, **common)
                return cls(None, authentication)
            temp = Path(tempfile.mkdtemp(prefix="llmos-"))
            try:
                # Ray's own health checks are left as they are: there is no other node to go
                # to, and a raylet that is starved for seconds must not end the system.
                ray.init(
                    "local",
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _temp_dir=str(temp),
                    **common,
                )
            except BaseException:
                ray.shutdown()  # What it had started until then.
                shutil.rmtree(temp, ignore_errors=True)
                raise
            return cls(temp, authentication)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError, RayError) as error:
            if authentication is not None:
                authentication.forget()
            raise ClusterError(
                f"Ray {'at ' + target if target else 'on this machine'} does not answer: {error}",
                remedy="Check the address, or start one with: ray start --head"
                if target
                else "See the log in the temporary folder, and that no old Ray holds the ports",
            ) from None
        except OSError as error:
            if authentication is not None:
                authentication.forget()
            raise ClusterError(
                f"Ray cannot be started or joined: {error}",
                remedy="LLMOS_HOME and TMPDIR must be folders that you can write",
            ) from None

    def kernel(self, system: SystemConfig, settings: Settings, *, detached: bool) -> Handle:
        """Start the kernel actor of a system.

        Raises:
            ClusterError: that system runs in this cluster already.
        """
        name = f"kernel:{system.system.name}"
        home = nodes.here()
        options: dict[str, Any] = {
            "name": name,
            # Where its folders are; elsewhere if that node is gone when it has to come back.
            "scheduling_strategy": NodeAffinitySchedulingStrategy(home.id, soft=True),
            "num_cpus": 0,
            "memory": MEMORY_BYTES,
            "max_concurrency": CONCURRENCY,
            "max_restarts": 0,
        }
        if detached:
            # It outlives this process, and comes back by itself: all it knows is in the store.
            options |= {"lifetime": "detached", "max_restarts": -1}
        try:
            handle: Handle = (
                ray.remote(KernelServer).options(**options).remote(system, settings, home)
            )
        except ValueError:
            raise ClusterError(
                f"System {system.system.name!r} runs in this cluster already",
                remedy="Use llmos down, or give [system] another name",
            ) from None
        return handle

    def find(self, system: str) -> Handle:
        """The kernel actor of a running system.

        Raises:
            ClusterError: there is none.
        """
        try:
            return ray.get_actor(f"kernel:{system}", namespace=NAMESPACE)
        except ValueError:
            raise ClusterError(
                f"No kernel of system {system!r} runs in the cluster at {self.address}",
                remedy="Start one: llmos up FILE",
            ) from None

    def stop(self) -> None:
        """Leave the cluster; a Ray that was started here ends with all its processes."""
        ray.shutdown()
        if self._temp is not None:
            shutil.rmtree(self._temp, ignore_errors=True)
        if self._token is not None:
            self._token.forget()
