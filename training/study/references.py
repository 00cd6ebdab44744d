"""Where all this comes from (row 29)."""

from typing import Final

from training.study.claims import Section, Table
from training.study.setup import Study

_INTRODUCTION: Final = """
The article builds on five texts; the first is the one to read next. Below them are the papers that single
experiments of this page follow. Numbers like 1906.02691 are those of arxiv.org.
"""

_SOURCES: Final = (
    ("Kingma and Welling, *An Introduction to Variational Autoencoders*, 2019", "1906.02691"),
    ("Levine, *CS 285: Deep Reinforcement Learning*, lecture 18, variational inference and generative models", ""),
    ("Doersch, *Tutorial on Variational Autoencoders*, 2016", "1606.05908"),
    ("Murphy, *Probabilistic Machine Learning: An Introduction*, 2022 (PML book 1)", ""),
    ("Murphy, *Probabilistic Machine Learning: Advanced Topics*, 2023 (PML book 2)", ""),
)

_PAPERS: Final = (
    (
        "Kingma and Welling, *Auto-Encoding Variational Bayes*, 2014",
        "1312.6114",
        "the VAE, the reparametrised gradient",
    ),
    (
        "Tipping and Bishop, *Probabilistic Principal Component Analysis*, 1999",
        "",
        "the model whose maximum is known in closed form",
    ),
    ("Bishop, *Mixture Density Networks*, 1994", "", "p(y given x) with several modes"),
    ("Hoffman et al., *Stochastic Variational Inference*, 2013", "1206.7051", "one q for every datapoint"),
    (
        "Burda, Grosse and Salakhutdinov, *Importance Weighted Autoencoders*, 2016",
        "1509.00519",
        "tighter bounds, NLL",
    ),
    ("Cremer, Li and Duvenaud, *Inference Suboptimality in VAEs*, 2018", "1801.03558", "the two parts of the gap"),
    ("Neal, *Annealed Importance Sampling*, 2001", "physics/9803008", "log p(x) without an encoder"),
    (
        "Grosse, Ghahramani and Adams, *Sandwiching the Marginal Likelihood*, 2015",
        "1511.02543",
        "bounds from both sides",
    ),
    (
        "Wu et al., *On the Quantitative Analysis of Decoder-Based Generative Models*, 2017",
        "1611.04273",
        "annealing for decoders",
    ),
    (
        "Roeder, Wu and Duvenaud, *Sticking the Landing*, 2017",
        "1703.09194",
        "a gradient without noise at the optimum",
    ),
    (
        "Tucker, Lawson, Gu and Maddison, *Doubly Reparameterized Gradient Estimators*, 2019",
        "1810.04152",
        "the same for many samples",
    ),
    (
        "Heusel et al., *GANs Trained by a Two Time-Scale Update Rule*, 2017",
        "1706.08500",
        "the Frechet distance between sets of images",
    ),
    ("Salimans et al., *Improved Techniques for Training GANs*, 2016", "1606.03498", "a classifier as a judge"),
)


def references(study: Study) -> Section:  # noqa: ARG001 - an experiment like all others
    """Row 29: what the article cites, and what this page follows."""
    return Section(
        "References",
        (29,),
        (
            _INTRODUCTION,
            Table(
                ("the article's references", "arXiv"), tuple((title, _link(number)) for title, number in _SOURCES)
            ),
            Table(
                ("followed here", "arXiv", "for"),
                tuple((title, _link(number), purpose) for title, number, purpose in _PAPERS),
            ),
        ),
    )


def _link(number: str) -> str:
    return f"[{number}](https://arxiv.org/abs/{number})" if number else ""
