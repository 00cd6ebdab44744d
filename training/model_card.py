"""The model card of a bundle: what it is, how good it is, and what it is not for."""

import shlex
import textwrap
from collections.abc import Iterator
from typing import Final, NamedTuple

from serving.bundle import Manifest
from training import presets
from training.config import ModelConfig, OptimizerConfig, TrainingConfig
from training.data import described
from training.evaluate import Evaluation
from training.mean_estimate import Estimate

_TEMPLATE = """\
# {name}

A variational autoencoder of {title}: an encoder from images to a posterior over {latent_dim} latent dimensions,
and a decoder from latents to images. Version `{version}`, trained until {created}.

![Samples from the prior](samples/prior.png)

Decoded means of draws from the prior, seed {seed_of_pictures}; not a selection.

![Test images above their reconstructions](samples/reconstructions.png)

## Figures

Test split, n = {n} images. Weights: {weights}. Bounds in nats per image, mean and standard error over the images.

| figure | value | standard error | |
|---|---|---|---|
| ELBO | {elbo} | E[log p(x given z)] - KL, higher is better |
| log-likelihood | {log_likelihood} | first term: reconstruction |
| KL | {kl} | second term: distance from the posterior to the prior |
| NLL, at most | {nll_iwae} | importance-weighted bound, k = {k}; lower is better |

Active latent dimensions (posterior mean varies by more than 0.01): {active_units} of {latent_dim}.
{conditions}

## Data

{title}. Split: {split}. SHA-256 of the unpacked training data: `{data_sha256}`.
Licence: {licence}.

## Model

- Prior: standard normal, {latent_dim} dimensions.
- Encoder and decoder: {kind}, {layers} and back, {activation}.
- Posterior: diagonal Gaussian, log variance clamped to [{log_var_min:g}, {log_var_max:g}].
- Likelihood: {likelihood}

## Training

{recipe}
Configuration SHA-256: `{config_sha256}`.

To reproduce: `{command}`

## Use

Everything is float32.

- Encoder: `data` (batch, {shape}), pixel units 0 to 255 -> `mean`, `log_var` (batch, {latent_dim}).
- Decoder: `latents` (batch, {latent_dim}) -> {outputs}, mean in [0, 1].

```python
import numpy as np, onnxruntime
decoder = onnxruntime.InferenceSession("decoder.onnx", providers=["CPUExecutionProvider"])
latents = np.random.default_rng(0).standard_normal((4, {latent_dim})).astype(np.float32)
{names} = decoder.run([{quoted_names}], {{"latents": latents}})
```

Over gRPC: `vae-serve up --bundle FOLDER`.

## Limits

- Made to demonstrate and to measure a service; no decision about a person should rest on it.
- It knows {title} alone. Other images get an answer too, and nothing in the answer warns.
- {encoded}
- The decoder's `mean` is the expected pixel, hence smoother than data; {drawn}.
"""


class _Words(NamedTuple):
    """What a card says about the likelihood of its model."""

    likelihood: str
    comparable: str
    visited: str
    outputs: str
    encoded: str
    drawn: str


_BERNOULLI: Final = _Words(
    likelihood="independent Bernoulli pixels.",
    comparable="Figures of other binarisations are not comparable.",
    visited="fresh binarisation at each visit",
    outputs="`logits`, `mean` (batch, {shape})",
    encoded="The encoder was fitted to binary pixels, 0 or 255. "
    "It accepts grey ones and takes them as expected values.",
    drawn="draw Bernoulli pixels for samples of data",
)
_GAUSSIAN: Final = _Words(
    likelihood="independent Gaussian pixels with one learned variance: a density over intensities in [0, 1]. The\n"
    "  variance's logarithm stays above {noise_log_var_min:g}, else constant pixels would drive the density up.",
    comparable="Its logarithm may be positive, and then the NLL is negative. In units of 255ths the ELBO would be "
    "smaller by log 255 for each pixel. Figures of other likelihoods or units are not comparable.",
    visited="intensities as they are, without added noise",
    outputs="`mean` (batch, {shape}), `log_var` (batch, {ones})",
    encoded="The density gives some probability to intensities below 0 and above 1, which no pixel has.",
    drawn="for samples of data add noise of\n  variance exp(`log_var`) and clip to [0, 1]",
)
_CATEGORICAL: Final = _Words(
    likelihood="independent categorical pixels, {num_levels} equally spaced levels of intensity from 0 to 1.",
    comparable="Figures of other likelihoods or numbers of levels are not comparable.",
    visited="each pixel on its nearest level",
    outputs="`logits` (batch, {num_levels}, {shape}), `mean` (batch, {shape})",
    encoded="Each pixel counts as its nearest of {num_levels} levels; what lies between them is lost.",
    drawn="draw a level for each pixel\n  for samples of data",
)
_BOUNDS: Final = {"elbo": "ELBO", "importance-weighted": "importance-weighted bound"}
_WIDTH: Final = 115
_WORDS: Final = {"bernoulli": _BERNOULLI, "gaussian": _GAUSSIAN, "categorical": _CATEGORICAL}


def model_card(manifest: Manifest, config: TrainingConfig, evaluation: Evaluation, *, picture_seed: int) -> str:
    """Return the card as Markdown."""
    model = config.model
    known = described(config.data)
    shape = ", ".join(str(length) for length in manifest.data_shape)
    facts = {
        "shape": shape,
        "ones": ", ".join("1" * len(manifest.data_shape)),
        "num_levels": manifest.num_levels,
        "noise_log_var_min": model.noise_log_var_min,
    }
    words = {key: text.format(**facts) for key, text in _WORDS[manifest.likelihood]._asdict().items()}
    conditions = (
        f"Binarisation: {evaluation.binarisation}, seed {evaluation.seed}. {words['comparable']}"
        if model.likelihood == "bernoulli"
        else f"Binarisation: {evaluation.binarisation}. {words['comparable']}"
    )
    return _TEMPLATE.format(
        likelihood=words["likelihood"],
        outputs=words["outputs"],
        encoded=words["encoded"],
        drawn=words["drawn"],
        conditions=textwrap.fill(conditions, _WIDTH),
        names=", ".join(manifest.decoder.outputs),
        quoted_names=", ".join(f'"{name}"' for name in manifest.decoder.outputs),
        name=manifest.name,
        version=manifest.version,
        created=manifest.created,
        title=known.title,
        licence=known.licence,
        seed_of_pictures=picture_seed,
        latent_dim=manifest.latent_dim,
        n=evaluation.num_images,
        weights=evaluation.weights,
        k=evaluation.num_importance_samples,
        elbo=_cells(evaluation.elbo),
        log_likelihood=_cells(evaluation.log_likelihood),
        kl=_cells(evaluation.kl),
        nll_iwae=_cells(evaluation.nll_iwae),
        active_units=evaluation.active_units,
        split=manifest.dataset.split,
        data_sha256=manifest.dataset.sha256,
        kind="convolutions and perceptrons" if model.channels else "multilayer perceptrons",
        layers=" - ".join(_layers(manifest, model)),
        activation=model.activation,
        log_var_min=model.log_var_min,
        log_var_max=model.log_var_max,
        recipe=textwrap.fill(_recipe(config, visited=words["visited"]), _WIDTH, break_on_hyphens=False),
        config_sha256=manifest.config_sha256,
        command=reproduction_command(config),
        shape=shape,
    )


def _recipe(config: TrainingConfig, *, visited: str) -> str:
    """Return in words what was climbed, and how."""
    settings = config.optimizer
    parts = [
        f"{settings.epochs} epochs",
        f"batches of {settings.batch_size}",
        f"Adam with a step size that falls from {settings.learning_rate:g} to {settings.final_learning_rate:g} "
        + {"cosine": "along half a cosine", "stages": "in eight stages"}[settings.schedule],
    ]
    if settings.bound == "elbo":
        rise = f"rising to {settings.beta:g} over the first {settings.warm_up_fraction:.0%} of the steps"
        parts.append(f"KL weight {rise if settings.warm_up_fraction else f'{settings.beta:g}'}")
    if settings.free_nats:
        parts.append(f"{settings.free_nats:g} nats of KL free in each latent dimension")
    parts.append(visited)
    if settings.precision == "bfloat16":
        parts.append("networks in bfloat16")
    decay = settings.ema_decay
    parts.append(f"moving average of the weights ({decay:g})" if decay else "no average of the weights")
    chosen = "The last checkpoint"
    if settings.selection == "validation":
        chosen = f"The checkpoint with the highest validation {_BOUNDS[settings.bound]}"
    return f"Maximises the {_objective(settings)}: {', '.join(parts)}. {chosen} was exported. Seed {config.seed}."


def _objective(settings: OptimizerConfig) -> str:
    """Return the bound that is climbed, and the estimate of its gradient."""
    samples = f"{settings.num_samples} samples" if settings.num_samples > 1 else "one sample"
    bound, gradient = _BOUNDS[settings.bound], settings.gradient
    if settings.bound == "importance-weighted":
        return f"{bound} of k = {settings.num_samples}, with the {gradient} gradient"
    if gradient == "reparametrised":
        return f"{bound} with {samples.replace(' ', ' reparametrised ')} and the closed-form KL term"
    baseline = "" if gradient != "score-function" else f" (baseline: {settings.baseline})"
    return f"{bound} with the {gradient} gradient{baseline} of {samples}"


def reproduction_command(config: TrainingConfig) -> str:
    """Return the command that repeats the run: the preset's name if it is one, and every value that differs."""
    base = presets.PRESETS[config.name]() if config.name in presets.PRESETS else presets.digits()
    name = config.name if config.name in presets.PRESETS else "digits"
    changes = [f"--set {shlex.quote(assignment)}" for assignment in config.changes_from(base)]
    return " ".join(["vae-train fit", name, *changes])


def _layers(manifest: Manifest, model: ModelConfig) -> Iterator[str]:
    """Name the encoder's layers by their widths; convolutions by their channels."""
    yield str(manifest.data_size)
    yield from (f"{number} channels" for number in model.channels)
    yield from (str(width) for width in (*model.hidden_dims, model.latent_dim))


def _cells(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} | {estimate.standard_error:.2f}"
