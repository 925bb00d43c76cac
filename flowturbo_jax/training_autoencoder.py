"""The autoencoder behind the latents that a model is trained on, and whether it is the model's."""

from flowturbo_jax import data, model_directory
from flowturbo_jax.data import latent_cache
from flowturbo_jax.interfaces import InputError, Params
from flowturbo_jax.model_directory import Model
from flowturbo_jax.models import VAE
from flowturbo_jax.train_config import TrainConfig


def autoencoder_of(source: data.DataSource) -> tuple[VAE | None, Params | None]:
    """What decodes a data set's latents; nothing where data are pixels."""
    if source.latents is None:
        return None, None
    params = latent_cache.load_vae(source.latents.directory, source.latents)
    return VAE(source.latents.vae), params


def checked_autoencoder(
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
        return autoencoder_of(source)
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
