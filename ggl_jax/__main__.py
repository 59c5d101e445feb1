"""Entry point of the ``ggl-jax`` command and of ``python -m ggl_jax``."""

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    from ggl_jax.cli import run

    sys.exit(run())


if __name__ == "__main__":
    main()
