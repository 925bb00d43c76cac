"""What a recipe trains: the network, its losses, and the model that comes of it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flowturbo_jax import conditioning, cost, data, model_directory, objective
from flowturbo_jax.conditioning import Conditioning
from flowturbo_jax.interfaces import InputError, Params
from flowturbo_jax.model_directory import Description, Model
from flowturbo_jax.models import CLIPText, TextPredictor, family
from flowturbo_jax.train_config import TrainConfig
from flowturbo_jax.training_autoencoder import autoencoder_of, checked_autoencoder

Batch = dict[str, Any]
CLIP_LENGTH = 77  # token ids of a text; shorter ones cost a little less
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
      source: the data set that batches are taken from; of texts, one of token ids.
      prompts: texts to sample pictures of on the way; () where there are labels for that.
      teacher_sha256: `model_directory.fingerprint` of the frozen predictor; "" without.
    """

    network: Any
    frozen: Params | None
    loss: Callable[[Params, Params | None, Batch, jax.Array], objective.Losses]
    evaluate: Callable[[Params, Params | None, Batch, jax.Array], dict[str, objective.Losses]]
    model: Callable[[Params], Model]
    multiply_adds: int
    source: data.DataSource
    prompts: tuple[str, ...] = ()
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
    kind, network_config, text = predictor_config_of(config.model)
    _check_fits(config, network_config, source)
    vae, vae_params = autoencoder_of(source)
    options = {"dtype": model_directory.network_dtype(config.dtype)}
    network = kind.predictor(network_config, remat=config.remat, **options)
    predictor = kind.predictor(network_config, **options)
    encoder = tokenizer = encoder_config = None
    work = (1 + BACKWARD) * forward_multiply_adds(predictor, network_config)
    if network_config.takes_text:
        shown, tokenizer, encoder_config = conditioning.of_new_texts(
            text, source, network_config.text_width
        )
        encoder = CLIPText(encoder_config, **options)
        network = TextPredictor(network, encoder)
        work += (1 + BACKWARD) * text_multiply_adds(encoder)
    else:
        shown = conditioning.of_labels(network_config, source)

    def evaluate(params, frozen, batch, key):
        draws = _draws(config, network_config, shown, frozen, batch, key)
        velocity = _apply(network, params)
        args = (batch["data"], draws["noise"], draws["t"], shown.embed(frozen, draws["dropped"]))
        return {"loss": objective.flow_matching_loss(velocity, *args), "t": draws["t"]}

    def loss(params, frozen, batch, key):
        return evaluate(params, frozen, batch, key)["loss"]

    def model(params):
        description = Description(
            family=config.model["family"],
            predictor=network_config,
            refiner=None,
            class_names=source.class_names if network_config.num_classes else (),
            guidance=config.guidance if _can_guide(network_config) else "none",
            guidance_scale=config.guidance_scale,
            guided_channels=None,
            source={"predictor": _provenance(config, shown.source)},
            vae=None if vae is None else vae.config,
            text_encoder=encoder_config,
        )
        both = {"predictor": params} if encoder is None else params
        return Model(
            description,
            predictor,
            both["predictor"],
            None,
            None,
            vae,
            vae_params,
            encoder,
            both.get("text_encoder"),
            tokenizer,
        )

    frozen = conditioning.frozen_with(shown, None)
    return Task(network, frozen, loss, evaluate, model, work, shown.source, shown.prompts)


def _refiner_task(config: TrainConfig, source: data.DataSource) -> Task:
    teacher = model_directory.load(config.model_dir, config.teacher_dtype)
    predictor_config = teacher.description.predictor
    _check_fits(config, predictor_config, source)
    vae, vae_params = checked_autoencoder(config, teacher, source)
    if predictor_config.takes_text:
        shown = conditioning.of_texts(teacher, config.model_dir, source)
    else:
        shown = conditioning.of_labels(predictor_config, source)
    kind = family(teacher.description.family)
    try:
        network_config = predictor_config.refiner(**_lists_as_tuples(config.model))
    except TypeError as error:
        raise InputError(f"config key model: {error}") from error
    options = {"dtype": model_directory.network_dtype(config.dtype)}
    network = kind.refiner(network_config, remat=config.remat, **options)
    trained = dataclasses.replace(
        teacher,
        description=dataclasses.replace(
            teacher.description,
            refiner=network_config,
            vae=None if vae is None else vae.config,
            guidance=config.guidance if _can_guide(predictor_config) else "none",
            guidance_scale=config.guidance_scale,
            source={**teacher.description.source, "refiner": _provenance(config, shown.source)},
        ),
        predictor=kind.predictor(predictor_config, **options),
        refiner=kind.refiner(network_config, **options),
        refiner_params=None,
        vae=vae,
        vae_params=vae_params,
    )

    def lesson(recipe, frozen, batch, key):
        draws = _draws(recipe, predictor_config, shown, frozen, batch, key)
        dropped = shown.embed(frozen, draws["dropped"])
        official = config.label_handling == "official"
        taught = objective.teach(
            _apply(teacher.predictor, conditioning.predictor_of(shown, frozen)),
            batch["data"],
            draws["noise"],
            draws["t"],
            draws["dt"],
            shown.embed(frozen, draws["condition"]) if official else dropped,
            dropped,
            config.label_handling,
        )
        return taught, dropped

    def loss(params, frozen, batch, key):
        return objective.lesson_loss(_apply(network, params), *lesson(config, frozen, batch, key))

    fair = dataclasses.replace(config, dt_per_sample=True, times_inside=True)

    def evaluate(params, frozen, batch, key):
        taught, dropped = lesson(fair, frozen, batch, key)
        keep = objective.lesson_loss(lambda x, v, t, labels: jnp.zeros_like(v), taught, dropped)
        refined = objective.lesson_loss(_apply(network, params), taught, dropped)
        return {"loss": refined, "keep_velocity": keep, "t": taught.t}

    def model(params):
        return dataclasses.replace(trained, refiner_params=params)

    work = 2 * forward_multiply_adds(kind.predictor(predictor_config), predictor_config)
    work += (1 + BACKWARD) * forward_multiply_adds(
        kind.refiner(network_config), predictor_config, 2
    )
    if "text_encoder" in shown.frozen:
        work += text_multiply_adds(teacher.text_encoder)
    # Networks cast each kernel to their dtype before they use it: cast once, they are smaller.
    fixed = jax.tree.map(
        lambda leaf: leaf.astype(teacher.predictor.dtype), teacher.predictor_params
    )
    frozen = conditioning.frozen_with(shown, fixed)
    sha256 = model_directory.fingerprint(teacher.predictor_params)
    return Task(network, frozen, loss, evaluate, model, work, shown.source, shown.prompts, sha256)


def predictor_config_of(model: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """The family, its hyper-parameters, and a text encoder's, that a recipe's `model` describes.

    Raises:
      InputError: it describes none.
    """
    fields = _lists_as_tuples(model)
    kind = family(fields.pop("family", None))
    if kind.fitted:
        raise InputError(
            f"config key model: the family {model['family']!r} is fitted, not trained; give its "
            "model directory as model_dir, and train a refiner for it"
        )
    size, text = fields.pop("size", None), fields.pop("text_encoder", None)
    try:
        network_config = kind.config.named(size, **fields) if size else kind.config(**fields)
    except (TypeError, AttributeError) as error:
        raise InputError(f"config key model: {error}") from error
    if (text is not None) != network_config.takes_text:
        raise InputError(
            f"config key model: the family {model['family']!r} "
            + ("needs a" if network_config.takes_text else "has no")
            + " text_encoder, such as {'num_layers': 2, 'num_heads': 4}"
        )
    return kind, network_config, dict(text or {})


def _lists_as_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a recipe as configs hold them."""
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
    }


def _can_guide(network_config: Any) -> bool:
    return network_config.takes_text or network_config.null_label is not None


def forward_multiply_adds(network: Any, config: Any, inputs: int = 1) -> int:
    """Multiply-adds of one sample's forward pass; a refiner has two inputs, x and v."""
    x = jax.ShapeDtypeStruct((1, *config.shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((1,), jnp.int32) if config.num_classes else None
    if config.takes_text:
        labels = jax.ShapeDtypeStruct((1, CLIP_LENGTH, config.text_width), jnp.float32)
    params = model_directory.abstract_params(network)
    arguments = (*[x] * inputs, jax.ShapeDtypeStruct((1,), jnp.float32), labels)
    return cost.multiply_adds(
        lambda params, args: _apply(network, params)(*args), params, arguments
    )


def text_multiply_adds(encoder: CLIPText) -> int:
    """Multiply-adds of encoding one text."""
    ids = jax.ShapeDtypeStruct((1, encoder.config.max_length), jnp.int32)
    params = model_directory.abstract_params(encoder)
    return cost.multiply_adds(lambda params, ids: _apply(encoder, params)(ids), params, ids)


def _apply(network: Any, params: Params) -> Callable:
    return lambda *args: network.apply({"params": params}, *args)


def _draws(
    config: TrainConfig,
    network_config: Any,
    shown: Conditioning,
    frozen: Any,
    batch: Any,
    key: jax.Array,
) -> dict[str, Any]:
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
    if network_config.num_classes or network_config.takes_text:
        condition = dropped = batch["label"]
        if shown.null is not None:
            null = jnp.asarray(shown.null(frozen)).astype(condition.dtype)
            null = jnp.broadcast_to(null[None], condition.shape)
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
    if network_config.takes_text:
        if config.objective != "refiner" and not config.label_dropout > 0:
            raise InputError(
                "label_dropout trains the empty text, which guidance needs: take more than 0"
            )
        return
    conditioning.of_labels(network_config, source)  # refuses captions
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
