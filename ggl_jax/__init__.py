"""ggl_jax: audit privacy defenses in federated learning by generative gradient leakage.

The flat public interface; the rooms behind it are ``client`` (what a client does with its private
data), ``priors`` (public knowledge of images), ``adversary`` (sees only the shared update) and
``audit`` (sees both sides and judges).
"""

from types import ModuleType as _ModuleType

from ggl_jax import _environment as _environment  # isort: skip (before JAX is imported)

from ggl_jax.adversary.attack import search_attack
from ggl_jax.adversary.attacks import ATTACKS, PRESETS, search_of
from ggl_jax.adversary.estimation import estimate
from ggl_jax.adversary.labels import infer_labels
from ggl_jax.adversary.losses import DISTANCES, REGULARIZERS
from ggl_jax.adversary.matching import matching_loss
from ggl_jax.adversary.optimizers import (
    OPTIMIZERS,
    adam,
    best_so_far,
    cma_es,
    hybrid,
    kalman,
    lbfgs,
    lbfgs_wolfe,
    turbo,
)
from ggl_jax.adversary.reconstruct import Reconstruction, reconstruct
from ggl_jax.adversary.search import Stage, run_search, run_stages
from ggl_jax.adversary.stages import make_stages
from ggl_jax.audit.data import load
from ggl_jax.audit.judge import judge
from ggl_jax.audit.metrics import METRICS, psnr, ssim
from ggl_jax.audit.run import AuditResult, RunResult, audit
from ggl_jax.audit.sweep import sweep
from ggl_jax.client.defenses import (
    DEFENSES,
    chain,
    clip,
    from_function,
    noise,
    parse,
    soteria,
    sparsify,
)
from ggl_jax.client.defenses.transformations import from_optax
from ggl_jax.client.functions import from_function_model, from_nnx
from ggl_jax.client.gradients import LOSSES, gradient, local_update
from ggl_jax.client.models import MODELS, convnet, from_flax, lenet, mlp, resnet18, vit
from ggl_jax.client.share import share
from ggl_jax.errors import GGLError
from ggl_jax.priors import PRIORS, dcgan, fit_latents, load_prior, pixels
from ggl_jax.spec import Client, Search, Speed
from ggl_jax.types import (
    Attack,
    Context,
    Defense,
    Factored,
    Facts,
    Info,
    Model,
    Optimizer,
    Prior,
    Problem,
    Public,
    Shared,
    View,
)

__version__ = "0.1.0"

#: All that is imported above.
__all__ = [
    name
    for name, value in list(vars().items())
    if not name.startswith("_") and not isinstance(value, _ModuleType)
]
