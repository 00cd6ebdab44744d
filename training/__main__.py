"""`python -m training`, and the entry point of `vae-train`: expected errors end in one line and an exit code."""

import os
import sys

from serving.errors import BundleError
from serving.typed_config import ConfigError
from training.cli import app
from training.errors import InvalidSetup, TrainingError


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 2 the command, its configuration or its data must change, 3 a gate failed, 128 + n ended by
    signal n with the state saved (130 for Ctrl-C, 143 for SIGTERM).
    """
    try:
        app(prog_name="vae-train")
    except (ConfigError, BundleError, OSError) as error:  # OSError: a file that cannot be written, and its name
        _end(error, InvalidSetup.exit_code)
    except TrainingError as error:
        _end(error, error.exit_code)


def _end(error: Exception, code: int) -> None:
    if os.environ.get("RANK", "0") == "0":  # of several processes that torchrun started, one says it
        print(f"vae-train: {error}", file=sys.stderr)  # noqa: T201  # standard error is for the person
    sys.exit(code)


if __name__ == "__main__":
    main()
