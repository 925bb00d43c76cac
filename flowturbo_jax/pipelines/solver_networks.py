"""The networks that a solver is learnt through: what their backward pass computes again."""

import dataclasses
from typing import Any

import jax

from flowturbo_jax.pipelines.class_to_image import ClassToImage

LARGE = 50_000_000  # parameters of a predictor whose blocks are recomputed unless told otherwise


def remat_of(pipe: ClassToImage, asked: str) -> str:
    """What is computed again: "none", "evaluations" or "blocks".

    Args:
      pipe: the model.
      asked: one of these, or "" for what suits the model's size.
    """
    if asked:
        return asked
    size = sum(leaf.size for leaf in jax.tree.leaves(pipe.model.predictor_params))
    return "blocks" if size > LARGE else "evaluations"


def recomputing(pipe: ClassToImage, asked: str) -> Any:
    """The model with networks to learn through: they recompute their blocks if wanted.

    And their attention is plain: the gradients of fused kernels differ from run to run.

    Args:
      pipe: the model.
      asked: as of `remat_of`.
    """
    again, built = remat_of(pipe, asked) == "blocks", {}
    for name in ("predictor", "refiner"):
        built[name] = module = getattr(pipe.model, name)
        if module is not None:
            wanted = {"remat": again, "attention": "xla"}
            built[name] = module.clone(**{k: v for k, v in wanted.items() if hasattr(module, k)})
    return dataclasses.replace(pipe.model, **built)
