"""The benchmark's report as a person reads it: tables, one line for each peer, and a page of Markdown."""

from collections.abc import Sequence
from typing import Final

from training.bench.report import OURS, BenchReport, EvaluationResult, Spread, TrainingResult

TRAINING_COLUMNS: Final = ["latents, batch, threads", "contestant", "images/s", "time / ours", "CPU", "ELBO"]
"""Head of the table of training."""

EVALUATION_COLUMNS: Final = ["threads", "contestant", "images/s", "time / ours", "CPU", "NLL", "minus ours"]
"""Head of the table of evaluations."""

_PAGE: Final = """\
# Training and evaluation against peers: a recorded run

{date}. {machine}.
{versions}.
Data: {data}.

Made by `make training-peers` and `vae-train bench --data-dir FOLDER --record tests/benchmarks/training.md`; all
figures are in the JSON file beside this one. Each contestant runs in a process of its own, and their epochs
alternate. A ratio is the time of a contestant divided by ours of the same round; shown are the median of
{num_rounds} rounds and their range. One more round came first and is left out. The ratio of processor time (CPU)
is less disturbed by other programs.

{verdicts}

## Training

784-{hidden_dim}-latents and back, ReLU, Bernoulli likelihood, one sample, Adam {learning_rate:g}, epochs of
{num_rows} rows; all begin with the same weights. Ours is `vae-train fit`, which draws binary pixels afresh at
each step and keeps a moving average of the weights; the others fit grey pixels, as their examples do. Validation
and saving are left out for all. pythae: its TrainingPipeline around our networks. Pyro, DataLoader: as its VAE
example; tensors: batches gathered from one tensor, its checks switched off. Tutorial loop: in the style of
pytorch/examples, samples converted one by one, the loss read at each step.

ELBO: on the same held-out binary images after the last epoch. A contestant is marked where it has another number
of parameters than ours, or its ELBO rose more than a tenth (and half a nat) less or more.

{training}

## Evaluation

Importance-weighted bound, k = {num_importance_samples}, of {max_images} binary images, with the weights that
ours fitted (784-{hidden_dim}-{latent_dim}). Ours is `vae-train evaluate`; get_nll is pythae's, with its default
of 100 samples at once and with all at once, without gradients. NLL with its standard error over the images; the
difference to ours with its Monte Carlo error, marked where it exceeds four of them.

{evaluation}
"""


def training_rows(report: BenchReport) -> list[list[str]]:
    """Return the table of training, without its head."""
    return [
        [
            f"{result.setting.latent_dim}, {result.setting.batch_size}, {result.setting.num_threads}",
            result.contestant,
            f"{result.images_per_second:,.0f}",
            str(result.timing.ratio),
            f"{result.timing.cpu_ratio.median:.2f}",
            f"{result.elbo:.1f}{'' if result.is_comparable else ' OTHER WORK'}",
        ]
        for result in report.training
    ]


def evaluation_rows(report: BenchReport) -> list[list[str]]:
    """Return the table of evaluations, without its head."""
    return [
        [
            str(result.setting.num_threads),
            result.contestant,
            f"{report.plan.max_images / result.timing.median_seconds:,.0f}",
            str(result.timing.ratio),
            f"{result.timing.cpu_ratio.median:.2f}",
            f"{result.nll:.3f} +- {result.standard_error:.3f}",
            _difference(result),
        ]
        for result in report.evaluation
    ]


def verdicts(report: BenchReport) -> list[str]:
    """Return one line for each peer: its median ratios over the settings, and whether they reach the target."""
    return [
        *_verdicts("training", report.training),
        *_verdicts("evaluation", report.evaluation),
        *(f"{name}: absent; `make training-peers` fetches its package" for name in report.absent),
    ]


def markdown(report: BenchReport) -> str:
    """Return the report as a page."""
    return _PAGE.format(
        date=report.date,
        machine=_listed(report.machine),
        versions=_listed(report.versions),
        data=report.data,
        verdicts="\n".join(f"- {line}" for line in verdicts(report)),
        training=_table(TRAINING_COLUMNS, training_rows(report)),
        evaluation=_table(EVALUATION_COLUMNS, evaluation_rows(report)),
        latent_dim=report.plan.latent_dims[0],
        **report.plan.model_dump(
            include={
                "num_rounds",
                "num_rows",
                "learning_rate",
                "num_importance_samples",
                "max_images",
                "hidden_dim",
            }
        ),
    )


def _verdicts(what: str, results: Sequence[TrainingResult] | Sequence[EvaluationResult]) -> list[str]:
    targets = {result.contestant: result.target for result in results if result.contestant != OURS}
    lines = []
    for name, target in targets.items():
        ratios = Spread.of([result.timing.ratio.median for result in results if result.contestant == name])
        lines.append(f"{what}, {name}: {ratios} times our time, target {target:g}: {_word(ratios, target)}")
    return lines


def _word(ratios: Spread, target: float) -> str:
    if ratios.low >= target:
        return "reached"
    return "missed" if ratios.high < target else "reached in some settings"


def _difference(result: EvaluationResult) -> str:
    if result.contestant == OURS:
        return ""
    mark = "" if result.agrees else " DISAGREES"
    return f"{result.difference:+.3f} +- {result.difference_standard_error:.3f}{mark}"


def _listed(facts: dict[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in facts.items())


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
