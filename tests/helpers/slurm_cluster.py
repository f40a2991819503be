"""A real Slurm on this machine for tests: slurmctld, munged and emulated nodes that have nothing in common but a disk.

Each node has a host name, network and processes of its own (Linux namespaces; ``slurm_cluster.sh`` is their inside), so
that ranks of two nodes meet over a network, and a node can lose its power. Nothing outside the cluster's own folder is
written. All of its processes end when the process that started it ends, however that is.

Root may do all this. Another user may where the system lets users make namespaces; Slurm then runs as that user.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import psutil

INSIDE = Path(__file__).with_suffix(".sh")
PACKAGES = "slurm-wlm munge iproute2 procps util-linux"
"""Of Debian and Ubuntu, with every program that a cluster needs."""
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "pgrep", "unshare", "nsenter", "setpriv")
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
NAMESPACES = ("--mount", "--uts", "--pid", "--net")
ROOT_USER = os.getuid() == 0
# Under a user id other than 0 Slurm does not try to change its user, which a namespace of one user could not allow.
OWN_USER = () if ROOT_USER else ("--user", "--map-current-user", "--keep-caps")
CONFIG = """\
ClusterName=test
SlurmctldHost=control(10.99.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A job that is requeued waits until its credential has expired: 2 minutes by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
# A node that comes back is used again at once.
ReturnToService=2
SlurmdTimeout=10
SchedulerParameters=bf_interval=2,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
NodeName={nodes} CPUs=8 RealMemory=4000
PartitionName=debug Nodes=ALL Default=YES
"""


def why_no_cluster() -> str | None:
    """Return why no cluster can be started on this machine, with the remedy; None where one can."""
    if missing := [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]:
        return f"{', '.join(missing)} not found; on Debian and Ubuntu: apt install {PACKAGES}"
    with contextlib.suppress(KeyError):
        pwd.getpwuid(os.getuid())
        trial = "mount --bind /etc/hosts /etc/hosts && ip link add br0 type bridge"
        command = ["unshare", *OWN_USER, *NAMESPACES, "--fork", "--mount-proc", "bash", "-c", trial]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": PATH})
        said = done.stderr.strip() or f"exit code {done.returncode}"
        return (
            f"this user may not make the namespaces of emulated nodes ({said}): run as root"
            if done.returncode
            else None
        )
    return f"user {os.getuid()} has no name in /etc/passwd, which Slurm asks for"


class SlurmCluster:
    """A running cluster, used as a context manager.

    Args:
        nodes: how many there are; their names are n1, n2 and so on.
    """

    def __init__(self, nodes: int = 2):
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        # A socket's path may have 107 characters, and pytest's own folders are longer.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self._outer: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> SlurmCluster:
        try:
            self._write_files()
            self._start()
            idle = lambda: self.call("sinfo", "-hN", "-t", "idle", "-o", "%N").split() == self.nodes  # noqa: E731
            self.wait_until(idle, 60, "all nodes are idle")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End every process of the cluster and remove its folder."""
        if self._outer is not None:
            self._outer.kill()  # which takes process 1 of the namespaces along, and that all others
            self._outer.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def logs(self) -> str:
        """Return the last lines of what Slurm's programs and the nodes have logged."""
        parts = []
        for path in sorted(self.folder.glob("*.log")):
            parts += [f"== {path.name}", *path.read_text(errors="replace").splitlines()[-25:]]
        return "\n".join(parts)

    def processes(self) -> list[psutil.Process]:
        """Return all processes of the cluster, those of its jobs among them."""
        assert self._outer is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self._outer.pid).children(recursive=True)
        return []

    def call(self, *command: str | Path, folder: Path | None = None, env: dict[str, str] | None = None) -> str:
        """Run a command on the host "control" in ``folder``, and return what it printed.

        ``env`` is the environment of the command and of the jobs that it submits, this process's where it is None.
        """
        inside = self._process_one()
        user = ("--user", "--preserve-credentials") if OWN_USER else ()
        enter = ["nsenter", f"--target={inside.pid}", *user, *NAMESPACES, f"--wd={folder or self.folder}"]
        variables = {
            **(os.environ if env is None else env),
            "PATH": PATH,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }
        done = subprocess.run(
            [*enter, "--", *map(str, command)],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}\n{self.logs()}"
        return done.stdout

    def job(self, number: int) -> dict[str, str]:
        """Return what Slurm knows of a job, by the names that ``scontrol show job`` has."""
        line = self.call("scontrol", "--oneliner", "show", "job", str(number))
        return dict(re.findall(r"(\S+?)=(\S*)", line))

    def wait_until(self, condition: Callable, seconds: float, what: str):  # type: ignore[no-untyped-def]
        """Call ``condition`` until it returns something true, and return that."""
        until = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > until:
                raise TimeoutError(f"not within {seconds:.0f} s: {what}\n{self.logs()}")
            time.sleep(0.2)
        return found

    def cut_power(self, node: str) -> None:
        """Kill every process of ``node`` at once, and leave it off until ``restore_power``."""
        (self.folder / f"{node}.off").touch()
        start = ["bash", str(INSIDE), "node", str(self.folder), node]
        (first,) = [
            p for p in self.processes() if p.cmdline()[: len(start)] == start and p.parent().name() == "unshare"
        ]
        first.kill()

    def restore_power(self, node: str) -> None:
        (self.folder / f"{node}.off").unlink()

    def _write_files(self) -> None:
        folder, names = self.folder, self.nodes
        folder.chmod(0o755)  # munged refuses a socket that others cannot reach
        (folder / "state").mkdir()
        addresses = {"localhost": "127.0.0.1", "control": "10.99.0.1", **self._addresses()}
        (folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in addresses.items()))
        config = CONFIG.format(user=pwd.getpwuid(os.getuid()).pw_name, folder=folder, nodes=f"n[1-{len(names)}]")
        (folder / "slurm.conf").write_text(config)
        (folder / "munge.key").touch(mode=0o600)
        (folder / "munge.key").write_bytes(os.urandom(128))

    def _addresses(self) -> dict[str, str]:
        return {name: f"10.99.0.{10 + number}" for number, name in enumerate(self.nodes, start=1)}

    def _start(self) -> None:
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", *OWN_USER, *NAMESPACES, "--fork", "--kill-child"]
        nodes = [f"{name}={address}" for name, address in self._addresses().items()]
        # The nodes hand their environment on to no job: sbatch takes that of its caller.
        env = {"PATH": PATH, "HOME": str(self.folder), "SLURM_CONF": str(self.folder / "slurm.conf"), "LC_ALL": "C"}
        with (self.folder / "cluster.log").open("w") as log:
            self._outer = subprocess.Popen(
                [*command, "--mount-proc", "bash", INSIDE, "cluster", self.folder, *nodes],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _process_one(self) -> psutil.Process:
        """Return process 1 of the cluster's namespaces."""
        assert self._outer is not None
        outer = psutil.Process(self._outer.pid)
        children = self.wait_until(outer.children, 10, "the cluster has started") if outer.is_running() else []
        assert children, f"the cluster has ended\n{self.logs()}"
        return children[0]
