"""Builds our images and runs them with nothing but Debian packages: no registry, no daemon.

The base comes from Debian's mirror by mmdebstrap, the Dockerfile is built by buildah without user namespaces, the
container is started by podman. Needs root, and what `REQUIRED` names. Where the machine's control groups are
a mix that podman refuses, it gets a mount namespace without the second version.
"""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).parents[2]
IMAGE: Final = ROOT / "deploy" / "image"
REQUIRED: Final = ("buildah", "podman", "crun", "mmdebstrap", "unshare")
BASE_PACKAGES: Final = "python3,python3-venv,ca-certificates"
"""What the base must bring: the same as the image python:3.11-slim-bookworm."""

BUILD_TIMEOUT_S: Final = 1800
_KEPT: Final = frozenset({"index-url", "trusted-host"})
"""Settings of pip that a build has as they are."""

_MOST: Final = {"nofile": 65_536, "nproc": 8192}
"""Limits of a container's processes, where this machine allows them."""

HARDENED: Final = (
    *("--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges"),
    *("--tmpfs", "/tmp:rw,nosuid,nodev,mode=1777,size=1g"),  # noqa: S108 - the container's own
    *("--shm-size", "256m"),
)
"""As a pod with the profile `restricted`, a read-only root and one emptyDir has it."""


class Failed(Exception):
    """A step did not work; the text is the end of what it printed."""

    def __init__(self, command: Sequence[str], *, output: str) -> None:
        super().__init__(f"{' '.join(command[:6])} ...: {output[-3000:]}")
        self.command, self.output = command, output


class Mounted(NamedTuple):
    """A folder of this machine in a container."""

    source: Path
    target: str
    mode: str = "ro"


def missing() -> list[str]:
    """Return the programs that are not here."""
    return [name for name in REQUIRED if shutil.which(name) is None]


class Workshop:
    """A storage of images of its own, and the programs that work on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.policy = folder / "policy.json"
        # Images come from this very folder; there is nobody who could have signed them.
        self.policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        self._storage = ["--root", str(folder / "storage"), "--runroot", str(folder / "run")]

    def buildah(self, *arguments: str, timeout_s: float = BUILD_TIMEOUT_S) -> str:
        """Run buildah; return what it printed."""
        return run(["buildah", *self._storage, *arguments], timeout_s=timeout_s)

    def podman(self, *arguments: str, timeout_s: float = 120) -> str:
        """Run podman; return what it printed."""
        return run(self.podman_command(*arguments), timeout_s=timeout_s)

    def podman_command(self, *arguments: str) -> list[str]:
        """Return the command that runs podman here."""
        podman = ["podman", *self._storage, "--cgroup-manager=cgroupfs", "--events-backend=none", *arguments]
        if not Path("/sys/fs/cgroup/unified").exists():
            return podman
        hidden = 'umount -l /sys/fs/cgroup/unified && exec "$@"'
        return ["unshare", "--mount", "--propagation", "private", "sh", "-c", hidden, "sh", *podman]

    def build_base(self) -> str:
        """Make an image of Debian 12 with Python 3.11; return its name."""
        context = self.folder / "base"
        context.mkdir()
        archive = context / "base.tar"
        options = ["--variant=minbase", f"--include={BASE_PACKAGES}"]
        run(["mmdebstrap", "--quiet", *options, "bookworm", str(archive)], timeout_s=BUILD_TIMEOUT_S)
        (context / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
        self._bud("localhost/base", [str(context)])
        archive.unlink()
        return "localhost/base"

    def build(self, target: str, *, base: str) -> str:
        """Build a target of our Dockerfile; return the image's name."""
        configuration, folders = _pip_configuration(self.folder)
        name = f"localhost/vae-{target}"
        secrets = [f"--secret=id={file.name},src={file}" for file in configuration]
        volumes = [f"--volume={folder}:{place}:ro" for folder, place in folders.items()]
        options = [
            f"--target={target}",
            f"--build-arg=BASE={base}",
            "--build-arg=REVISION=test",
            *secrets,
            *volumes,
        ]
        files = [f"--ignorefile={IMAGE / 'Dockerfile.dockerignore'}", f"--file={IMAGE / 'Dockerfile'}"]
        self._bud(name, [*options, *files, str(ROOT)])
        return name

    def _bud(self, tag: str, arguments: list[str]) -> None:
        how = ["--isolation=chroot", "--network=host", "--pull-never", "--format=docker", "--timestamp=0"]
        self.buildah("bud", f"--signature-policy={self.policy}", *how, f"--tag={tag}", *arguments)

    @contextlib.contextmanager
    def container(
        self,
        image: str,
        *command: str,
        mounts: Sequence[Mounted] = (),
        network: str = "host",
        options: Sequence[str] = (),
    ) -> Iterator["Container"]:
        """Start a hardened container; remove it at the end."""
        name = f"vae-{os.getpid()}-{time.monotonic_ns()}"
        # Podman would raise limits, which not everybody may; and it has systemd call health checks.
        limits = [*map(_allowed, ("nofile", "nproc")), "--cgroups=disabled", "--no-healthcheck"]
        volumes = [f"--volume={mount.source}:{mount.target}:{mount.mode}" for mount in mounts]
        where = [f"--name={name}", "--pull=never", f"--network={network}"]
        self.podman("run", "--detach", *where, *limits, *HARDENED, *volumes, *options, image, *command)
        try:
            yield Container(self, name)
        finally:
            with contextlib.suppress(Failed):
                self.podman("rm", "--force", "--time=0", name)

    def size_bytes(self, image: str) -> int:
        """Return the size of an image, unpacked."""
        return int(self.podman("image", "inspect", "--format={{.Size}}", image))


class Container(NamedTuple):
    """A running container."""

    workshop: Workshop
    name: str

    def execute(self, *command: str, timeout_s: float = 120) -> str:
        """Run a command inside; return what it printed."""
        return self.workshop.podman("exec", self.name, *command, timeout_s=timeout_s)

    def is_running(self) -> bool:
        """Return whether its first process lives."""
        state = self.workshop.podman("inspect", "--format={{.State.Running}}", self.name)
        return state.strip() == "true"

    def wait(self, *, timeout_s: float) -> int:
        """Return its exit code once it has ended."""
        return int(self.workshop.podman("wait", self.name, timeout_s=timeout_s))

    def stop(self, *, grace_s: int) -> int:
        """Ask it to end, as a kubelet does; return its exit code."""
        self.workshop.podman("stop", f"--time={grace_s}", self.name, timeout_s=grace_s + 30)
        return int(self.workshop.podman("inspect", "--format={{.State.ExitCode}}", self.name))

    def logs(self) -> str:
        """Return what it printed."""
        return self.workshop.podman("logs", self.name)


@contextlib.contextmanager
def workshop() -> Iterator[Workshop]:
    """Return a storage that is removed at the end, with what it holds."""
    folder = Path(tempfile.mkdtemp(prefix="vae-images-"))
    made = Workshop(folder)
    try:
        yield made
    finally:
        for unmounts in (made.podman_command("umount", "--all"), ["buildah", "rm", "--all"]):
            subprocess.run(unmounts, capture_output=True, check=False)
        shutil.rmtree(folder, ignore_errors=True)


def run(command: Sequence[str], *, timeout_s: float) -> str:
    """Run a command and return its standard output.

    Raises:
        Failed: If its exit code is not 0.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode != 0:
        raise Failed(command, output=f"{done.stdout}\n{done.stderr}")
    return done.stdout


def _allowed(limit: str) -> str:
    _, hard = resource.getrlimit(getattr(resource, f"RLIMIT_{limit.upper()}"))
    most = _MOST[limit] if hard == resource.RLIM_INFINITY else min(hard, _MOST[limit])
    return f"--ulimit={limit}={most}:{most}"


def _pip_configuration(folder: Path) -> tuple[list[Path], dict[Path, str]]:
    """Write how pip reaches its index here, as secrets of a build; return them, and folders with their places."""
    lines = run([sys.executable, "-m", "pip", "config", "list"], timeout_s=60).splitlines()
    known = {key.split(".")[-1]: value.strip("'") for key, _, value in (line.partition("=") for line in lines)}
    # Folders that every Debian has: a place that a mount makes would stay in the image.
    places = dict(zip(map(Path, known.get("find-links", "").split()), ("/mnt", "/srv", "/media"), strict=False))
    kept = {key: value for key, value in known.items() if key in _KEPT}
    secrets = [folder / "pip.conf"]
    if places:
        kept["find-links"] = " ".join(places.values())
    if certificates := known.get("cert"):
        kept["cert"] = "/run/secrets/ca.crt"
        secrets.append(folder / "ca.crt")
        shutil.copy(certificates, secrets[-1])
    secrets[0].write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in kept.items()))
    return secrets, places
