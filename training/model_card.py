"""The model card of a bundle: what it is, how good it is, and what it is not for."""

import shlex
from collections.abc import Iterator

from serving.bundle import Manifest
from training import presets
from training.config import ModelConfig, TrainingConfig
from training.data import described
from training.evaluate import Estimate, Evaluation

_TEMPLATE = """\
# {name}

A variational autoencoder of {title}: an encoder from images to a posterior over {latent_dim} latent dimensions,
and a decoder from latents to images. Version `{version}`, trained until {created}.

![Samples from the prior](samples/prior.png)

Decoded means of draws from the prior, seed {seed_of_pictures}; not a selection.

![Test images above their reconstructions](samples/reconstructions.png)

## Figures

Test split, n = {n} images, averaged weights. Bounds in nats per image, mean and standard error over the images.

| figure | value | standard error | |
|---|---|---|---|
| ELBO | {elbo} | E[log p(x given z)] - KL, higher is better |
| log-likelihood | {log_likelihood} | first term: reconstruction |
| KL | {kl} | second term: distance from the posterior to the prior |
| NLL, at most | {nll_iwae} | importance-weighted bound, k = {k}; lower is better |

Active latent dimensions (posterior mean varies by more than 0.01): {active_units} of {latent_dim}.
Binarisation: {binarisation}, seed {evaluation_seed}. Figures of other binarisations are not comparable.

## Data

{title}. Split: {split}. SHA-256 of the unpacked training data: `{data_sha256}`.
Licence: {licence}.

## Model

- Prior: standard normal, {latent_dim} dimensions.
- Encoder and decoder: {kind}, {layers} and back, {activation}.
- Posterior: diagonal Gaussian, log variance clamped to [{log_var_min:g}, {log_var_max:g}].
- Likelihood: independent Bernoulli pixels.

## Training

Maximises the ELBO with one reparametrised sample and the closed-form KL term: {epochs} epochs, batches of
{batch_size}, Adam with a cosine schedule from {learning_rate:g} to {final_learning_rate:g}, KL weight rising to
{beta:g} over the first {warm_up:.0%} of the steps, fresh binarisation at each visit, moving average of the weights
({ema_decay:g}). The checkpoint with the highest validation ELBO was exported. Seed {seed}.
Configuration SHA-256: `{config_sha256}`.

To reproduce: `{command}`

## Use

Everything is float32.

- Encoder: `data` (batch, {shape}), pixel units 0 to 255 -> `mean`, `log_var` (batch, {latent_dim}).
- Decoder: `latents` (batch, {latent_dim}) -> `logits`, `mean` (batch, {shape}), mean in [0, 1].

```python
import numpy as np, onnxruntime
decoder = onnxruntime.InferenceSession("decoder.onnx", providers=["CPUExecutionProvider"])
latents = np.random.default_rng(0).standard_normal((4, {latent_dim})).astype(np.float32)
logits, mean = decoder.run(["logits", "mean"], {{"latents": latents}})
```

Over gRPC: `vae-serve up --bundle FOLDER`.

## Limits

- Made to demonstrate and to measure a service; no decision about a person should rest on it.
- It knows {title} alone. Other images get an answer too, and nothing in the answer warns.
- The encoder was fitted to binary pixels, 0 or 255. It accepts grey ones and takes them as expected values.
- The decoder's `mean` is the expected pixel, hence smoother than data; draw Bernoulli pixels for samples of data.
"""


def model_card(manifest: Manifest, config: TrainingConfig, evaluation: Evaluation, *, picture_seed: int) -> str:
    """Return the card as Markdown."""
    model, optimizer = config.model, config.optimizer
    known = described(config.data)
    return _TEMPLATE.format(
        name=manifest.name,
        version=manifest.version,
        created=manifest.created,
        title=known.title,
        licence=known.licence,
        seed_of_pictures=picture_seed,
        latent_dim=manifest.latent_dim,
        n=evaluation.num_images,
        k=evaluation.num_importance_samples,
        elbo=_cells(evaluation.elbo),
        log_likelihood=_cells(evaluation.log_likelihood),
        kl=_cells(evaluation.kl),
        nll_iwae=_cells(evaluation.nll_iwae),
        active_units=evaluation.active_units,
        binarisation=evaluation.binarisation,
        evaluation_seed=evaluation.seed,
        split=manifest.dataset.split,
        data_sha256=manifest.dataset.sha256,
        kind="convolutions and perceptrons" if model.channels else "multilayer perceptrons",
        layers=" - ".join(_layers(manifest, model)),
        activation=model.activation,
        log_var_min=model.log_var_min,
        log_var_max=model.log_var_max,
        epochs=optimizer.epochs,
        batch_size=optimizer.batch_size,
        learning_rate=optimizer.learning_rate,
        final_learning_rate=optimizer.final_learning_rate,
        beta=optimizer.beta,
        warm_up=optimizer.warm_up_fraction,
        ema_decay=optimizer.ema_decay,
        seed=config.seed,
        config_sha256=manifest.config_sha256,
        command=reproduction_command(config),
        shape=", ".join(str(length) for length in manifest.data_shape),
    )


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
