"""Subcommands of ``ggl-jax``, one file each: options with their help texts, and ``run``."""
"""One file for each subcommand of ``ggl-jax``."""
