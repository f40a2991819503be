"""One run a folder: a lock file names the process that trains in a run folder.

Rank 0 of a run holds ``run-N.lock``. A thread renews the file's time every few seconds, which is its heartbeat.

    starter            sees                              does
    ---------------    ------------------------------    ---------------------------------------------------------
    no lock            nothing                           makes run-1.lock
    the owner lives    run-3.lock                        is refused
    the owner died     run-3.lock                        makes run-4.lock, looks whether it is alone, removes run-3.lock

A file is made complete under its name, and only if the name is free (a hard link): of several starters that see the
same lock, one gets the next number. A starter that was held up, and made a number that others have passed since, sees
a lock that it did not judge, and withdraws.

Whether an owner lives is asked of the system where it runs on this machine. Of another machine the heartbeat tells:
its age is the difference to the time of a file that the starter itself touches in the same folder. Both times are the
file system's, so that the machines' clocks do not matter.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from megachiar.data.storage.regular_file import open_regular
from megachiar.data.storage.sealed_json import parse_sealed, with_seal
from megachiar.errors import UserError, disk_error, disk_errors
from megachiar.launcher_watch import INTERVAL_S as LAUNCHER_INTERVAL_S
from megachiar.launcher_watch import find_launcher
from megachiar.process_identity import ProcessIdentity

HEARTBEAT_S = 5.0
DEAD_AFTER_S = 60.0
"""Age of a heartbeat, in seconds, at which an owner on another machine counts as dead."""
_ORPHAN_ENDS_WITHIN_S = 10 * LAUNCHER_INTERVAL_S
_NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)
_NAME = re.compile(r"run-(\d{1,18})\.lock")
_LONGEST_LOCK = 1 << 20  # bytes
_LARGEST_PID = (1 << 31) - 1
_MOST_RANKS = 1 << 20


@dataclass(frozen=True)
class Attempt:
    """Which start of which job: an earlier start of the same job has ended, wherever it ran.

    Attributes:
        job: id of a Slurm job or of a torchrun run; empty where neither started the process.
        number: how often the job was started before.
    """

    job: str = ""
    number: int = 0

    @classmethod
    def current(cls) -> Attempt:
        """Return the attempt that the environment tells of."""
        env = os.environ
        if env.get("TORCHELASTIC_RUN_ID", "none") != "none" and env.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            return cls(f"torchrun {env['TORCHELASTIC_RUN_ID']}", int(env["TORCHELASTIC_RESTART_COUNT"]))
        if "SLURM_JOB_ID" in env:
            return cls(f"Slurm job {env['SLURM_JOB_ID']}", int(env.get("SLURM_RESTART_COUNT", "0")))
        return cls()

    def follows(self, other: Attempt) -> bool:
        """Return whether this is a later start of the same job."""
        return bool(self.job) and self.job == other.job and self.number > other.number


@dataclass(frozen=True)
class Owner:
    """What a lock says of the run that holds it.

    Attributes:
        process: rank 0 of the run.
        launcher: the processes between it and its launcher, the launcher included; they may be gone already.
        attempt: the job that the run belongs to.
        ranks: number of the run's ranks.
        since: when the run started, in words.
        token: random characters that tell this lock from all others.
    """

    process: ProcessIdentity
    launcher: tuple[ProcessIdentity, ...]
    attempt: Attempt
    ranks: int
    since: str
    token: str

    @classmethod
    def current(cls, ranks: int) -> Owner:
        """Return the owner that this process is."""
        return cls(
            process=ProcessIdentity.of(os.getpid()),
            launcher=tuple(find_launcher(os.getpid())),
            attempt=Attempt.current(),
            ranks=ranks,
            since=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            token=secrets.token_hex(8),
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Owner:
        """Return the owner that a lock file holds.

        Raises:
            ValueError: the text is no lock, or was altered.
        """
        fields = parse_sealed(text)
        try:
            owner = cls(
                process=ProcessIdentity(**fields.pop("process")),
                launcher=tuple(ProcessIdentity(**process) for process in fields.pop("launcher")),
                attempt=Attempt(**fields.pop("attempt")),
                **fields,
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError("not a lock of a run") from error
        owner._check_values()
        return owner

    def to_json(self) -> str:
        """Return the text of the lock file."""
        return json.dumps(with_seal(asdict(self)), indent=2) + "\n"

    def _check_values(self) -> None:
        """Raise a ``ValueError`` if a value has another type, or is none that a run can have."""
        processes, attempt = (self.process, *self.launcher), self.attempt
        texts = [self.since, self.token, attempt.job, *(text for p in processes for text in (p.host, p.machine))]
        pids, starts = [p.pid for p in processes], [p.started for p in processes if p.started is not None]
        if not (
            all(isinstance(text, str) for text in texts)
            and all(type(number) is int for number in [*pids, *starts, self.ranks, attempt.number])
            and all(0 < pid <= _LARGEST_PID for pid in pids)
            and 0 < self.ranks <= _MOST_RANKS
        ):
            raise ValueError("not a lock of a run")

    def is_orphan(self) -> bool:
        """Return whether the launcher of this owner is gone, so that the owner ends by itself within seconds."""
        return any(process.runs() is False for process in self.launcher)

    def __str__(self) -> str:
        job = f", {self.attempt.job}" if self.attempt.job else ""
        return f"{self.process}{job}, since {self.since}"


@dataclass(frozen=True)
class LockFile:
    """A lock as a starter finds it.

    Attributes:
        number: of the file.
        owner: who wrote it; None if nobody can tell from its content.
        heartbeat: time of the file, in seconds of the file system's clock.
    """

    number: int
    owner: Owner | None
    heartbeat: float

    @property
    def key(self) -> tuple[int, str | None]:
        """What this lock is recognised by, whatever its heartbeat."""
        return self.number, self.owner.token if self.owner else None


class RunLock:
    """Context in which this process alone trains in a run folder; rank 0 alone enters it.

    Args:
        folder: the run folder; it is made if need be, and removed again if nothing but the lock was ever in it.
        ranks: number of the run's ranks.
        log: prints a line of the log.

    Raises:
        UserError: another run works in the folder, or the folder cannot be written.
    """

    def __init__(self, folder: Path, ranks: int, log: Callable[[str], None]):
        self.folder = folder
        self.owner = Owner.current(ranks)
        self._log = log
        self._number = 0
        self._made = False
        self._released = threading.Event()

    @property
    def path(self) -> Path:
        """The lock file of this process."""
        return self.folder / f"run-{self._number}.lock"

    def __enter__(self) -> RunLock:
        with disk_errors(self.folder):
            self._made = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._acquire()
        threading.Thread(target=self._send_heartbeats, name="run lock", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Remove the lock, if it is still this process's; a second call changes nothing."""
        self._released.set()
        with contextlib.suppress(OSError):
            if self.is_held():
                self.path.unlink()
            if self._made:
                self.folder.rmdir()  # refused unless it is empty

    def confirm(self) -> None:
        """Check that this process still owns the folder, before it replaces something there.

        Raises:
            UserError: another run has taken the folder over, since this process was stopped for a long time.
        """
        with disk_errors(self.path, "read"):
            is_held = self.is_held()
        if is_held:
            return
        if not (self.folder.is_dir() and read_locks(self.folder)):
            raise UserError(
                self.folder,
                f"{self.path.name} is gone: the folder was moved or emptied while this run worked in it",
                "start the run again with logging.folder where its checkpoints are now",
            )
        raise UserError(
            self.folder,
            "another run has taken this run folder over while this process gave no sign of life",
            "leave the folder to the other run",
        )

    def is_held(self) -> bool:
        """Return whether the lock file is there and names this process."""
        found = _read(self.path)
        return found is not None and found.owner == self.owner

    def _acquire(self) -> None:
        waiting = _Waiting(self.folder, self._log)
        with _own_file(self.folder, self.owner) as mine:
            while True:
                seen = read_locks(self.folder)
                if waiting.must_wait(seen, self.owner, _touch(mine)):
                    time.sleep(0.2)
                    continue
                self._number = max((lock.number for lock in seen), default=0) + 1
                if not _link(mine, self.path):
                    continue
                judged = {lock.key for lock in seen} | {(self._number, self.owner.token)}
                if all(lock.key in judged for lock in read_locks(self.folder)):
                    break
                self.path.unlink(missing_ok=True)
        for lock in seen:
            who = lock.owner or "an unknown process"
            self._log(f"[yellow]took over the run folder from {who}, which ended without releasing it[/]")
            (self.folder / f"run-{lock.number}.lock").unlink(missing_ok=True)

    def _send_heartbeats(self) -> None:
        while not self._released.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):  # a disk that is away for a while is no reason to end a run
                os.utime(self.path)


class _Waiting:
    """Decides whether a starter goes on, waits or is refused, from what it sees again and again."""

    def __init__(self, folder: Path, log: Callable[[str], None]):
        self._folder = folder
        self._log = log
        self._first_heartbeats: dict[tuple[int, str | None], float] = {}
        self._orphan_until: float | None = None
        self._said = False

    def must_wait(self, locks: list[LockFile], me: Owner, now: float) -> bool:
        """Return whether it cannot be told yet if an owner lives; False means that all owners are dead.

        Args:
            locks: that are in the folder.
            me: who asks.
            now: time of the file system's clock.

        Raises:
            UserError: an owner lives.
        """
        waits = [self._must_wait_for(lock, me, now) for lock in locks]  # of every lock: any may refuse
        return any(waits)

    def _must_wait_for(self, lock: LockFile, me: Owner, now: float) -> bool:
        owner, age = lock.owner, now - lock.heartbeat
        if owner is not None and me.attempt.follows(owner.attempt):
            return False
        runs = None if owner is None else owner.process.runs()
        if runs is False:
            return False
        if runs:
            assert owner is not None
            if owner.is_orphan() and self._orphan_ends_soon():
                return True
            raise self._refusal(str(owner))
        if self._first_heartbeats.setdefault(lock.key, lock.heartbeat) != lock.heartbeat:
            raise self._refusal(str(owner or "a process that writes no readable lock"))
        if age > DEAD_AFTER_S:
            return False
        if not self._said:
            self._said = True
            self._log(
                f"the run folder was last used by {owner or 'an unknown process'}, {age:.0f} s ago: "
                f"waiting for a sign of life, for at most {DEAD_AFTER_S - age:.0f} s"
            )
        return True

    def _orphan_ends_soon(self) -> bool:
        """Return whether an owner without a launcher may still be about to end."""
        if self._orphan_until is None:
            self._orphan_until = time.monotonic() + _ORPHAN_ENDS_WITHIN_S
        return time.monotonic() < self._orphan_until

    def _refusal(self, owner: str) -> UserError:
        return UserError(
            self._folder,
            f"another run works in this run folder: {owner}",
            "wait for it or stop it, or name another logging.folder",
        )


def read_locks(folder: Path) -> list[LockFile]:
    """Return the locks of a run folder, the lowest number first.

    Raises:
        UserError: the folder or a lock cannot be read.
    """
    with disk_errors(folder, "read"):
        paths = [folder / name for name in os.listdir(folder) if _NAME.fullmatch(name)]
        return sorted((lock for path in paths if (lock := _read(path))), key=lambda lock: lock.number)


def _read(path: Path) -> LockFile | None:
    """Return the lock at ``path``, None if there is none.

    The file is opened before its time is asked, since network file systems may know the time of an opened file only.
    """
    match = _NAME.fullmatch(path.name)
    assert match is not None
    try:
        with open_regular(path) as file:
            text, heartbeat = file.read(_LONGEST_LOCK), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        if path.is_symlink():  # a link to nothing takes the name, and no lock could be made for ever
            raise
        return None
    try:
        owner = Owner.from_json(text)
    except ValueError:
        owner = None
    return LockFile(int(match[1]), owner, heartbeat)


@contextlib.contextmanager
def _own_file(folder: Path, owner: Owner) -> Iterator[Path]:
    """Write a lock's content to a file of its own, under a name that no other process uses, as long as this lasts."""
    path = folder / f".run-{owner.token}.new"
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(owner.to_json())
            file.flush()
            os.fsync(file.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)


def _touch(path: Path) -> float:
    """Return the file system's clock, in seconds."""
    os.utime(path)
    with open(path, encoding="utf-8") as file:
        return os.fstat(file.fileno()).st_mtime


def _link(source: Path, path: Path) -> bool:
    """Give ``source`` the second name ``path``; return False if that name is taken."""
    try:
        os.link(source, path)
    except FileExistsError:
        return os.stat(source).st_nlink == 2 and os.path.samefile(source, path)  # a network may repeat a request
    except OSError as error:
        if error.errno in _NO_HARD_LINKS:
            return _copy(source, path)
        raise disk_error(path, error) from error
    return True


def _copy(source: Path, path: Path) -> bool:
    """Do what ``_link`` does on a file system without hard links."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        return False
    return True
