"""What a recipe trains: the network, its losses, and the model that comes of it."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flowturbo_jax import data, model_directory, objective
from flowturbo_jax.interfaces import InputError, Params
from flowturbo_jax.model_directory import Description, Model
from flowturbo_jax.models import family
from flowturbo_jax.train_config import TrainConfig

Losses = Callable[[Params, Params | None, dict[str, jax.Array], jax.Array], dict[str, jax.Array]]


class Task(NamedTuple):
    """What is trained.

    Attributes:
      network: module whose parameters are trained.
      frozen: parameters the losses need besides, or None.
      losses: `(params, frozen, batch, key) -> {name: [B]}`; "loss" is what is minimised.
      evaluate: as losses, on the times a sampler asks for whatever the recipe trains on: a step
        size per sample, and t + dt <= 1. So recipes can be compared.
      model: `(params) -> Model`, to sample from and to save.
    """

    network: Any
    frozen: Params | None
    losses: Losses
    evaluate: Losses
    model: Callable[[Params], Model]


def make_task(config: TrainConfig, source: data.DataSource) -> Task:
    """The task a recipe describes, on a data set.

    Raises:
      InputError: the model does not fit the data.
    """
    return {"flow_matching": _predictor_task, "refiner": _refiner_task}[config.objective](
        config, source
    )


def _predictor_task(config: TrainConfig, source: data.DataSource) -> Task:
    fields = dict(config.model)
    kind = family(fields.pop("family", None))
    try:
        network_config = kind.config(**fields)
    except TypeError as error:
        raise InputError(f"config key model: {error}") from error
    _check_fits(config, network_config, source)
    options = {"dtype": model_directory.network_dtype(config.dtype)}
    network = kind.predictor(network_config, remat=config.remat, **options)

    def losses(params, frozen, batch, key):
        draws = _draws(config, network_config, batch, key)
        predictor = _apply(network, params)
        args = (batch["data"], draws["noise"], draws["t"], draws["dropped"])
        return {"loss": objective.flow_matching_loss(predictor, *args)}

    def model(params):
        description = Description(
            family=config.model["family"],
            predictor=network_config,
            refiner=None,
            class_names=source.class_names if network_config.num_classes else (),
            guidance=config.guidance if network_config.null_label is not None else "none",
            guidance_scale=config.guidance_scale,
            guided_channels=None,
            source={"predictor": _provenance(config, source)},
        )
        return Model(description, kind.predictor(network_config, **options), params, None, None)

    return Task(network, None, losses, losses, model)


def _refiner_task(config: TrainConfig, source: data.DataSource) -> Task:
    teacher = model_directory.load(config.model_dir, config.dtype)
    predictor_config = teacher.description.predictor
    _check_fits(config, predictor_config, source)
    kind = family(teacher.description.family)
    try:
        network_config = predictor_config.refiner(**config.model)
    except TypeError as error:
        raise InputError(f"config key model: {error}") from error
    options = {"dtype": model_directory.network_dtype(config.dtype)}
    network = kind.refiner(network_config, remat=config.remat, **options)
    trained = Model(
        dataclasses.replace(
            teacher.description,
            refiner=network_config,
            guidance=config.guidance if predictor_config.null_label is not None else "none",
            guidance_scale=config.guidance_scale,
            source={**teacher.description.source, "refiner": _provenance(config, source)},
        ),
        teacher.predictor,
        teacher.predictor_params,
        kind.refiner(network_config, **options),
        None,
        teacher.vae,
        teacher.vae_params,
    )

    def losses(recipe, params, frozen, batch, key):
        draws = _draws(recipe, predictor_config, batch, key)

        def loss(refiner):
            return objective.refiner_loss(
                refiner,
                _apply(teacher.predictor, frozen),
                batch["data"],
                draws["noise"],
                draws["t"],
                draws["dt"],
                draws["condition"],
                draws["dropped"],
                config.label_handling,
            )

        return {
            "loss": loss(_apply(network, params)),
            "keep_velocity": loss(lambda x, v, t, condition: jnp.zeros_like(v)),
        }

    def model(params):
        return dataclasses.replace(trained, refiner_params=params)

    fair = dataclasses.replace(config, dt_per_sample=True, times_inside=True)
    return Task(
        network, teacher.predictor_params, partial(losses, config), partial(losses, fair), model
    )


def _apply(network: Any, params: Params) -> Callable:
    return lambda *args: network.apply({"params": params}, *args)


def _draws(config: TrainConfig, network_config: Any, batch: Any, key: jax.Array) -> dict[str, Any]:
    """Everything random in a step, each sample's a function of (key, its index in the batch)."""
    keys = jax.vmap(lambda k: jax.random.split(k, 4))(objective.sample_keys(key, batch["index"]))
    noise = objective.draw_noise(keys[:, 0], network_config.shape)
    t = objective.draw_times(keys[:, 1])
    step_keys = keys[:, 2]
    if not config.dt_per_sample:
        # No sample has this index, so no sample's draws share this key.
        step_keys = jnp.broadcast_to(jax.random.fold_in(key, 2**32 - 1), step_keys.shape)
    dt = objective.draw_steps(step_keys, (config.dt_min, config.dt_max))
    if config.objective == "refiner" and config.times_inside:
        t = objective.fit_times(t, dt)
    draws = {"noise": noise, "t": t, "dt": dt, "condition": None, "dropped": None}
    if network_config.num_classes:
        condition = dropped = batch["label"]
        if network_config.null_label is not None:
            null = jnp.full_like(condition, network_config.null_label)
            dropped = objective.drop_condition(keys[:, 3], condition, null, config.label_dropout)
        draws.update(condition=condition, dropped=dropped)
    return draws


def _check_fits(config: TrainConfig, network_config: Any, source: data.DataSource) -> None:
    if network_config.shape != source.shape:
        raise InputError(
            f"the model takes {list(network_config.shape)}, but {source.name} has "
            f"{list(source.shape)}; change the model's input_size and in_channels"
        )
    has_null = network_config.null_label is not None
    if network_config.num_classes and (config.label_dropout > 0) != has_null:
        raise InputError(
            "label_dropout trains the null class, so a model has both or neither: label_dropout is "
            f"{config.label_dropout}, null_class {has_null}"
        )
    if network_config.num_classes not in (0, len(source.class_names)):
        raise InputError(
            f"the model has {network_config.num_classes} classes, but {source.name} has "
            f"{len(source.class_names)}"
        )


def _provenance(config: TrainConfig, source: data.DataSource) -> dict[str, Any]:
    return {"data_fingerprint": source.fingerprint, **dataclasses.asdict(config)}
