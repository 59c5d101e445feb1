"""One file for each subcommand of ``ggl-jax``."""
