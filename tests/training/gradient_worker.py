"""One of several processes that share a batch: writes the gradients it has after the backward pass.

Says which threads of a process group are left when all is done.

`python -m tests.training.gradient_worker FOLDER`, in the environment that torchrun gives.
"""

import sys
import time
from pathlib import Path
from typing import Final

import torch

from training import distributed
from training.config import ModelConfig, OptimizerConfig
from training.distributed import Processes
from training.models.vae import VAE
from training.noise import TrainingStream, generator
from training.step_objective import StepObjective, noise_shape

BATCH_SIZE: Final = 12
SEED: Final = 5

DOWNLOAD_S: Final = 0.5
"""What the first process does alone takes so long; the other one would be done by then."""

SETTINGS: Final = {
    "elbo": OptimizerConfig(),
    "several samples": OptimizerConfig(num_samples=3),
    "free bits": OptimizerConfig(free_nats=0.02),
    "sticking the landing": OptimizerConfig(gradient="sticking-the-landing", num_samples=2),
    "score function": OptimizerConfig(gradient="score-function", baseline="leave-one-out", num_samples=3),
    "doubly reparametrised": OptimizerConfig(
        bound="importance-weighted", gradient="doubly-reparametrised", num_samples=4, warm_up_fraction=0
    ),
}
"""One objective of each kind."""


def gradients(settings: OptimizerConfig, processes: Processes) -> dict[str, torch.Tensor]:
    """Return the gradient of every weight after a backward pass on this process's rows of a batch."""
    config = ModelConfig(latent_dim=4, hidden_dims=(16,))
    vae = VAE(config, (1, 8, 8), generator(SEED, TrainingStream.INIT))
    objective = processes.divided(
        StepObjective(vae, settings, joined_mean=processes.joined_mean), torch.device("cpu")
    )
    source = torch.Generator().manual_seed(SEED)
    data = (torch.rand((BATCH_SIZE, 1, 8, 8), generator=source) < 0.4).float()
    noise = torch.randn(noise_shape(settings, BATCH_SIZE, 4), generator=source)
    rows = processes.rows(BATCH_SIZE)
    climbed, _ = objective(data[rows], noise[rows], torch.ones(()))
    climbed.backward()
    return {name: weight.grad for name, weight in vae.named_parameters() if weight.grad is not None}


def main() -> None:
    """Wait for a pretended download, then write the gradients of every objective to FOLDER/RANK.pt."""
    folder = Path(sys.argv[1])
    with distributed.joined("cpu") as processes:
        with processes.first_alone():
            if processes.is_first:
                time.sleep(DOWNLOAD_S)
                (folder / "downloaded").touch()
            elif not (folder / "downloaded").exists():
                raise FileNotFoundError("this process did not wait for the first one")
        found = {name: gradients(settings, processes) for name, settings in SETTINGS.items()}
        torch.save(found, folder / f"{processes.rank}.pt")


def _threads() -> list[str]:
    """Return the names of this process's threads, as the kernel knows them."""
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


if __name__ == "__main__":
    main()
    sys.stdout.write("\n".join(name for name in _threads() if "gloo" in name))
