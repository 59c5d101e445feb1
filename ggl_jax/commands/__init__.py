"""Subcommands of ``ggl-jax``, one file each: options with their help texts, and ``run``."""
