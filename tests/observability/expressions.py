"""The metrics that PromQL names."""

import re
from typing import Final

_FUNCTIONS: Final = frozenset(
    {"avg_over_time", "clamp_min", "group_left", "histogram_quantile", "last_over_time"}
)  # those with an underscore, as every metric of ours and Ray's


def metric_names(expr: str) -> set[str]:
    """Return the names of the metrics in an expression; recorded ones, which have a colon, are left out.

    Example:
        >>> sorted(metric_names('sum by (job) (rate(a_total{b="c"}[5m])) / on (job) job:a:rate5m or d_info'))
        ['a_total', 'd_info']
    """
    without_labels = re.sub(r"\b(by|on|ignoring|group_left|without)\s*\([^)]*\)", " ", expr)
    without_selectors = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", without_labels)
    words = re.findall(r"[a-z][\w:]*", without_selectors)
    return {word for word in words if "_" in word and ":" not in word} - _FUNCTIONS
