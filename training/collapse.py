"""Whether latents still say anything about the data."""

from typing import Final, Literal

from torch import Tensor

COLLAPSE_KL: Final = 1.0
"""Below this KL term, nats per row, the latents carry next to nothing: the posterior has collapsed."""

MIN_ACTIVE_SHARE: Final = 0.25
"""Below this share of active dimensions the model pays for many latents that it does not use."""

ACTIVE_VARIANCE: Final = 0.01
"""A latent dimension is active if its posterior mean varies over the data by more than this.

Burda, Grosse and Salakhutdinov, 2016, section 5.2. https://arxiv.org/abs/1509.00519
"""

Alarm = Literal["kl", "active-units"]


def num_active_units(means: Tensor) -> int:
    """Return the number of active dimensions among posterior means, shape (n, latent_dim)."""
    return int((means.var(dim=0) > ACTIVE_VARIANCE).sum())


def alarms(*, kl: float, active_units: int, latent_dim: int) -> tuple[Alarm, ...]:
    """Return what says that the posterior has collapsed; empty if nothing does.

    The KL term alone suffices, for it bounds what the latents carry. The count of active dimensions does not: one
    whose mean varies by little more than 0.01 is active, and carries 0.005 nats.

    Args:
        kl: KL term, nats per row, after the warm-up.
        active_units: Active dimensions.
        latent_dim: Dimensions in all.

    Example:
        >>> alarms(kl=0.4, active_units=12, latent_dim=32)
        ('kl',)
        >>> alarms(kl=9.0, active_units=7, latent_dim=32)
        ('active-units',)
    """
    # Not "kl < limit": a KL that is not a number is no good sign.
    by_kl: tuple[Alarm, ...] = () if kl >= COLLAPSE_KL else ("kl",)
    by_units: tuple[Alarm, ...] = () if active_units >= MIN_ACTIVE_SHARE * latent_dim else ("active-units",)
    return by_kl + by_units


def described(raised: tuple[Alarm, ...], *, kl: float, active_units: int, latent_dim: int) -> str:
    """Return the alarm in words, with what to do about it."""
    reasons = {
        "kl": f"the KL term is {kl:.2f} nats, below {COLLAPSE_KL:g}: the latents carry nothing",
        "active-units": f"{active_units} of {latent_dim} latent dimensions are active, "
        f"fewer than {MIN_ACTIVE_SHARE:.0%}",
    }
    said = "; ".join(reasons[reason] for reason in raised)
    return f"the posterior has collapsed: {said}; lower optimizer.beta or raise optimizer.warm_up_fraction"
