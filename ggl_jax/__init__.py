"""ggl_jax: audit privacy defenses in federated learning by generative gradient leakage.

The flat public interface; the rooms behind it are ``client`` (what a client does with its private
data), ``priors`` (public knowledge of images), ``adversary`` (sees only the shared update) and
``audit`` (sees both sides and judges).
"""

from ggl_jax import _environment as _environment  # isort: skip (before JAX is imported)

from ggl_jax.adversary.attacks import (
    ATTACKS,
    dlg,
    ggl,
    grad_inversion,
    idlg,
    inverting_gradients,
    make_attack,
    pixel_refinement,
)
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
    lbfgs,
    lbfgs_wolfe,
    turbo,
)
from ggl_jax.adversary.reconstruct import Reconstruction, reconstruct
from ggl_jax.adversary.search import Stage, run_search, run_stages
from ggl_jax.adversary.strategy import AttackSettings, make_stages
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
from ggl_jax.client.gradients import gradient, local_update
from ggl_jax.client.models import MODELS, convnet, from_flax, lenet, resnet18
from ggl_jax.client.share import ClientSettings, share
from ggl_jax.errors import GGLError
from ggl_jax.priors import PRIORS, dcgan, fit_latents, load_prior, pixels
from ggl_jax.types import (
    Attack,
    Context,
    Defense,
    Factored,
    Info,
    Model,
    Optimizer,
    Prior,
    Problem,
    Public,
    Shared,
)

__version__ = "0.1.0"

__all__ = [
    "ATTACKS",
    "DEFENSES",
    "DISTANCES",
    "METRICS",
    "MODELS",
    "OPTIMIZERS",
    "PRIORS",
    "REGULARIZERS",
    "Attack",
    "AttackSettings",
    "AuditResult",
    "ClientSettings",
    "Context",
    "Defense",
    "Factored",
    "GGLError",
    "Info",
    "Model",
    "Optimizer",
    "Prior",
    "Problem",
    "Public",
    "Reconstruction",
    "RunResult",
    "Shared",
    "Stage",
    "adam",
    "audit",
    "best_so_far",
    "chain",
    "clip",
    "cma_es",
    "convnet",
    "dcgan",
    "dlg",
    "estimate",
    "fit_latents",
    "from_flax",
    "from_function",
    "ggl",
    "grad_inversion",
    "gradient",
    "hybrid",
    "idlg",
    "infer_labels",
    "inverting_gradients",
    "judge",
    "lbfgs",
    "lbfgs_wolfe",
    "lenet",
    "load",
    "load_prior",
    "local_update",
    "make_attack",
    "make_stages",
    "matching_loss",
    "noise",
    "parse",
    "pixel_refinement",
    "pixels",
    "psnr",
    "reconstruct",
    "resnet18",
    "run_search",
    "run_stages",
    "share",
    "soteria",
    "sparsify",
    "ssim",
    "sweep",
    "turbo",
]
