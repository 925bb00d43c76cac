"""What a recipe trains: the network, its losses, and the model that comes of it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flowturbo_jax import cost, data, model_directory, objective
from flowturbo_jax.data import latent_cache
from flowturbo_jax.interfaces import InputError, Params
from flowturbo_jax.model_directory import Description, Model
from flowturbo_jax.models import VAE, family
from flowturbo_jax.train_config import TrainConfig

Batch = dict[str, Any]
BACKWARD = 2  # in forward passes: products with the transposed inputs, and with the kernels


class Task(NamedTuple):
    """What is trained.

    Attributes:
      network: module whose parameters are trained.
      frozen: parameters the losses need besides, or None.
      loss: `(params, frozen, batch, key) -> [B]`, what is minimised.
      evaluate: `(params, frozen, batch, key) -> {name: [B]}`: the flow time "t" of each sample, its
        "loss", and what that is to be compared with. It takes the times a sampler asks for whatever
        the recipe trains on (a step size per sample, t + dt <= 1), so recipes can be compared.
      model: `(params) -> Model`, to sample from and to save.
      multiply_adds: of one sample in one training step, a backward pass counting as two forward
        passes, and what is computed twice to save memory as once.
      teacher_sha256: `model_directory.fingerprint` of the frozen parameters; "" without.
    """

    network: Any
    frozen: Params | None
    loss: Callable[[Params, Params | None, Batch, jax.Array], objective.Losses]
    evaluate: Callable[[Params, Params | None, Batch, jax.Array], dict[str, objective.Losses]]
    model: Callable[[Params], Model]
    multiply_adds: int
    teacher_sha256: str = ""


def make_task(config: TrainConfig, source: data.DataSource) -> Task:
    """The task a recipe describes, on a data set.

    Raises:
      InputError: the model does not fit the data.
    """
    return {"flow_matching": _predictor_task, "refiner": _refiner_task}[config.objective](
        config, source
    )


def _predictor_task(config: TrainConfig, source: data.DataSource) -> Task:
    kind, network_config = predictor_config_of(config.model)
    _check_fits(config, network_config, source)
    vae, vae_params = _autoencoder_of(source)
    options = {"dtype": model_directory.network_dtype(config.dtype)}
    network = kind.predictor(network_config, remat=config.remat, **options)

    def evaluate(params, frozen, batch, key):
        draws = _draws(config, network_config, batch, key)
        predictor = _apply(network, params)
        args = (batch["data"], draws["noise"], draws["t"], draws["dropped"])
        return {"loss": objective.flow_matching_loss(predictor, *args), "t": draws["t"]}

    def loss(params, frozen, batch, key):
        return evaluate(params, frozen, batch, key)["loss"]

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
            vae=None if vae is None else vae.config,
        )
        predictor = kind.predictor(network_config, **options)
        return Model(description, predictor, params, None, None, vae, vae_params)

    work = (1 + BACKWARD) * forward_multiply_adds(kind.predictor(network_config), network_config)
    return Task(network, None, loss, evaluate, model, work)


def _refiner_task(config: TrainConfig, source: data.DataSource) -> Task:
    teacher = model_directory.load(config.model_dir, config.teacher_dtype)
    predictor_config = teacher.description.predictor
    _check_fits(config, predictor_config, source)
    vae, vae_params = _checked_autoencoder(config, teacher, source)
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
            vae=None if vae is None else vae.config,
            guidance=config.guidance if predictor_config.null_label is not None else "none",
            guidance_scale=config.guidance_scale,
            source={**teacher.description.source, "refiner": _provenance(config, source)},
        ),
        kind.predictor(predictor_config, **options),
        teacher.predictor_params,
        kind.refiner(network_config, **options),
        None,
        vae,
        vae_params,
    )

    def lesson(recipe, frozen, batch, key):
        draws = _draws(recipe, predictor_config, batch, key)
        shown = objective.teach(
            _apply(teacher.predictor, frozen),
            batch["data"],
            draws["noise"],
            draws["t"],
            draws["dt"],
            draws["condition"],
            draws["dropped"],
            config.label_handling,
        )
        return shown, draws["dropped"]

    def loss(params, frozen, batch, key):
        return objective.lesson_loss(_apply(network, params), *lesson(config, frozen, batch, key))

    fair = dataclasses.replace(config, dt_per_sample=True, times_inside=True)

    def evaluate(params, frozen, batch, key):
        shown, dropped = lesson(fair, frozen, batch, key)
        keep = objective.lesson_loss(lambda x, v, t, labels: jnp.zeros_like(v), shown, dropped)
        refined = objective.lesson_loss(_apply(network, params), shown, dropped)
        return {"loss": refined, "keep_velocity": keep, "t": shown.t}

    def model(params):
        return dataclasses.replace(trained, refiner_params=params)

    work = 2 * forward_multiply_adds(kind.predictor(predictor_config), predictor_config)
    work += (1 + BACKWARD) * forward_multiply_adds(
        kind.refiner(network_config), predictor_config, 2
    )
    # Networks cast each kernel to their dtype before they use it: cast once, they are smaller.
    frozen = jax.tree.map(
        lambda leaf: leaf.astype(teacher.predictor.dtype), teacher.predictor_params
    )
    sha256 = model_directory.fingerprint(teacher.predictor_params)
    return Task(network, frozen, loss, evaluate, model, work, sha256)


def predictor_config_of(model: Mapping[str, Any]) -> tuple[Any, Any]:
    """The family, and the hyper-parameters, that a recipe's `model` describes.

    Raises:
      InputError: it describes none.
    """
    fields = dict(model)
    kind = family(fields.pop("family", None))
    if kind.fitted:
        raise InputError(
            f"config key model: the family {model['family']!r} is fitted, not trained; give its "
            "model directory as model_dir, and train a refiner for it"
        )
    size = fields.pop("size", None)
    try:
        network_config = kind.config.named(size, **fields) if size else kind.config(**fields)
    except (TypeError, AttributeError) as error:
        raise InputError(f"config key model: {error}") from error
    return kind, network_config


def _autoencoder_of(source: data.DataSource) -> tuple[VAE | None, Params | None]:
    """What decodes a data set's latents; nothing where data are pixels."""
    if source.latents is None:
        return None, None
    params = latent_cache.load_vae(source.latents.directory, source.latents)
    return VAE(source.latents.vae), params


def _checked_autoencoder(
    config: TrainConfig, teacher: Model, source: data.DataSource
) -> tuple[VAE | None, Params | None]:
    """The teacher's autoencoder, or that of the latents for a teacher that has none.

    Raises:
      InputError: the latents are another autoencoder's.
    """
    if source.latents is None:
        if teacher.vae is not None:
            raise InputError(
                f"{config.model_dir} moves latents, and {source.name} holds images; turn them into "
                f"latents: python -m flowturbo_jax encode --vae={config.model_dir} --help"
            )
        return None, None
    if teacher.vae is None:
        return _autoencoder_of(source)
    if model_directory.fingerprint(teacher.vae_params) != source.latents.vae_fingerprint:
        raise InputError(
            f"the latents in {source.latents.directory} were made with another VAE than that of "
            f"{config.model_dir}; encode the images again with --vae={config.model_dir}"
        )
    if teacher.vae.config != source.latents.vae:
        raise InputError(
            f"the VAE of {config.model_dir} has other hyper-parameters than that of the latents in "
            f"{source.latents.directory}; encode the images again with --vae={config.model_dir}"
        )
    return teacher.vae, teacher.vae_params


def forward_multiply_adds(network: Any, config: Any, inputs: int = 1) -> int:
    """Multiply-adds of one sample's forward pass; a refiner has two inputs, x and v."""
    x = jax.ShapeDtypeStruct((1, *config.shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((1,), jnp.int32) if config.num_classes else None
    params = model_directory.abstract_params(network)
    arguments = (*[x] * inputs, jax.ShapeDtypeStruct((1,), jnp.float32), labels)
    return cost.multiply_adds(
        lambda params, args: _apply(network, params)(*args), params, arguments
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
            f"{list(source.shape)}; change the model's input_size and in_channels, or image_size, "
            "or turn images into latents: python -m flowturbo_jax encode --help"
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
