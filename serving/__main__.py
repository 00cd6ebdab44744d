"""Entry point of `vae-serve` and `python -m serving`."""

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    # Here, because processes that a command starts import this module too, and need no command line.
    from serving.cli import run  # noqa: PLC0415

    sys.exit(run())


if __name__ == "__main__":
    main()
