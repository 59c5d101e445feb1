"""One gate for what users bring: tried before any work, refused in one line.

Each object is tried on abstract shapes (``jax.eval_shape``) and, where values matter, on two small
ones. A refusal is a :class:`ggl_jax.GGLError` that names the argument, what it gave, what is
allowed and the remedy. What ships with the project is tested by the tests, and not tried on values
again.
"""
