"""Entry point of `vae-serve` and `python -m serving`."""

import sys

from serving.cli import run


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(run())


if __name__ == "__main__":
    main()
