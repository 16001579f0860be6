"""What `start` has to know before it can listen, from a memo where there is one. Loads nothing: `start` is timed.

Reading the configuration whole costs more than the 25 ms that `start` has. So who has read it notes beside the file's
stamp what `start` needs of it, and which version a containerd said it is; a file that has changed is read again.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sandshift.config import Config

MEMO_DIR = "/run/sandshift-start"
DEFAULT_CONFIG = "/etc/sandshift/config.toml"
SOCKET_PATH_BYTES_MAX = 106
CONTAINERD_VERSION_S = 5
ABSENT = "absent"


class Ground:
    """`run_dir` and `network_namespace`: the configuration's. `memo_dir`: where memos lie; empty: nowhere."""

    __slots__ = ("memo_dir", "network_namespace", "run_dir")

    def __init__(self, run_dir: str, network_namespace: str, memo_dir: str = MEMO_DIR) -> None:
        self.run_dir = run_dir
        self.network_namespace = network_namespace
        self.memo_dir = memo_dir

    @classmethod
    def of(cls, config: Config) -> Ground:
        return cls(config.places.run_dir, config.host.network_namespace)

    def sandbox_run_dir(self, namespace: str, sandbox_id: str) -> str:
        return f"{self.run_dir}/{namespace}/{sandbox_id}"

    def shim_socket(self, namespace: str, sandbox_id: str) -> str:
        """The same as Config.shim_socket."""
        path = f"{self.sandbox_run_dir(namespace, sandbox_id)}/shim.sock"
        if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX:
            return path
        import hashlib  # noqa: PLC0415 - for long paths only

        digest = hashlib.sha256(f"{namespace}/{sandbox_id}".encode()).hexdigest()
        return f"{self.run_dir}/s/{digest[:32]}.sock"


def find_ground(memo_dir: str = MEMO_DIR) -> Ground:
    """From the memo if the configuration is the one that it is of, else from the configuration itself.

    Raises:
        Rejected: the configuration is wrong.
    """
    named = os.environ.get("SANDSHIFT_CONFIG", "")
    path = named or DEFAULT_CONFIG
    stamp = _stamp(path)
    noted = recall(memo_dir, f"config{path}", stamp)
    if noted is not None and len(noted) == 2:
        return Ground(noted[0], noted[1], memo_dir)
    from sandshift.config import load  # noqa: PLC0415 - what the memo spares us

    config = load()
    ground = Ground(config.places.run_dir.rstrip("/"), config.host.network_namespace, memo_dir)
    if stamp != ABSENT or not named:
        note(memo_dir, f"config{path}", stamp, [ground.run_dir, ground.network_namespace])
    return ground


def containerd_is_two(publish_binary: str, memo_dir: str = MEMO_DIR) -> bool:
    """Whether this containerd is 2.0 or newer, as it says itself: once, then from the memo."""
    path = publish_binary if publish_binary.startswith("/") else _our_parent()
    stamp = _stamp(path)
    noted = recall(memo_dir, f"containerd{path}", stamp)
    if noted is None:
        noted = [_version_of(path)]
        note(memo_dir, f"containerd{path}", stamp, noted)
    return noted[0] == "2"


def _our_parent() -> str:
    try:
        return os.readlink(f"/proc/{os.getppid()}/exe")  # noqa: PTH115
    except OSError:
        return ""


def _version_of(path: str) -> str:
    """The first number of "containerd github.com/containerd/containerd/v2 2.1.9+x"; "1" if it says nothing of the kind."""
    import subprocess  # noqa: PLC0415 - once for each containerd

    try:
        ran = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=CONTAINERD_VERSION_S, check=False
        )
        words = ran.stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return "1"
    major = words[2].lstrip("v").partition(".")[0] if len(words) > 2 and words[0] == "containerd" else ""
    return "2" if major.isdigit() and int(major) >= 2 else "1"


def _stamp(path: str) -> str:
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return ABSENT
    return f"{status.st_mtime_ns} {status.st_size} {status.st_ino}"


def recall(memo_dir: str, name: str, stamp: str) -> list[str] | None:
    """What was noted beside this very stamp; None: nothing, or somebody else could have written it."""
    try:
        status = os.stat(memo_dir)  # noqa: PTH116
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            return None
        with open(_memo(memo_dir, name)) as file:  # noqa: PTH123
            first, *values = file.read().split("\n")
    except (OSError, ValueError):
        return None
    return values if first == stamp else None


def note(memo_dir: str, name: str, stamp: str, values: list[str]) -> None:
    """Write it down for the next `start`. That it cannot be written is no error."""
    if not memo_dir or any("\n" in value for value in values):
        return
    path = _memo(memo_dir, name)
    temporary = f"{path}.{os.getpid()}"
    try:
        os.makedirs(memo_dir, mode=0o700, exist_ok=True)  # noqa: PTH103
        with open(temporary, "w") as file:  # noqa: PTH123
            file.write("\n".join([stamp, *values]))
        os.replace(temporary, path)  # noqa: PTH105
    except OSError:
        return


def _memo(memo_dir: str, name: str) -> str:
    return f"{memo_dir}/{name.replace('!', '!!').replace('/', '!')}"
