"""Where a run took place: what a reader needs to repeat it."""

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Final

import torch

_TOOLS: Final = ("torch", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "numpy")
_GIT_TIMEOUT_S: Final = 5.0
_CPU_INFO: Final = Path("/proc/cpuinfo")


def tool_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide the numbers."""
    versions = {"python": platform.python_version()}
    for tool in _TOOLS:
        try:
            versions[tool] = metadata.version(tool)
        except metadata.PackageNotFoundError:  # Either of the two ONNX Runtimes is enough.
            continue
    return versions


def hardware(device: torch.device) -> str:
    """Return the name of what computes: the GPU, or the processor with its cores and PyTorch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    return f"{processor()}, {threads}"


def environment_json(*, seed: int, device: torch.device) -> str:
    """Return environment.json: versions, git commit, seed, device, threads."""
    content = {
        "tool_versions": tool_versions(),
        "git_commit": git_commit(),
        "seed": seed,
        "device": device.type,
        "device_name": hardware(device),
        "num_threads": torch.get_num_threads(),
    }
    return json.dumps(content, indent=2) + "\n"


def processor() -> str:
    """Return the processor's model; its architecture where the system does not tell the model."""
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return platform.machine()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def git_commit() -> str | None:
    """Return the commit of this source tree; None outside a repository, in somebody else's, or without git."""
    here = Path(__file__)
    try:
        subprocess.run(  # noqa: S603  # fixed words
            ["git", "ls-files", "--error-unmatch", here.name],  # noqa: S607  # whichever git the user has
            cwd=here.parent,
            capture_output=True,
            timeout=_GIT_TIMEOUT_S,
            check=True,
        )
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],  # noqa: S607  # whichever git the user has
            cwd=here.parent,
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
