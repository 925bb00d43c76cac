"""FlowTurbo in JAX: frozen flow-matching image generators, sampled several times faster."""

from flowturbo_jax import metrics
from flowturbo_jax.interfaces import Flow, InputError, State
from flowturbo_jax.learnt_solver import LearntSolver
from flowturbo_jax.multistep import Solver
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.pipelines.program_cache import enable as cache_programs
from flowturbo_jax.pipelines.text_to_image import TextToImage
from flowturbo_jax.sampler import integrate, sample
from flowturbo_jax.schedule import Schedule

__all__ = [
    "ClassToImage",
    "Flow",
    "InputError",
    "LearntSolver",
    "Schedule",
    "Solver",
    "State",
    "TextToImage",
    "cache_programs",
    "integrate",
    "metrics",
    "sample",
]
