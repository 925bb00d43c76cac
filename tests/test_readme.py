"""What README says works: its Python examples run as they stand, its files exist."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowturbo_jax as ft

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TASKS = (ROOT / "docs/tasks.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def standard_promotion():
    """Examples are for users, who run JAX with its defaults."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def run(marker: str) -> dict:
    """The names left by the one example that contains the marker."""
    (example,) = [example for example in EXAMPLES if marker in example]
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    return names


def test_the_mixture_example_lands_on_the_mixture(standard_promotion):
    names = run("def velocity")
    distances = np.linalg.norm(names["data"][:, None] - np.asarray(names["means"]), axis=-1)
    nearest = distances.argmin(axis=1)
    # Samples of the exact flow lie around their mean with deviation sigma in each direction.
    spread = distances.min(axis=1)
    assert (spread < 4 * names["sigma"]).mean() > 0.98
    np.testing.assert_allclose(np.bincount(nearest) / len(nearest), 1 / 3, atol=0.05)
    fine = ft.sample(ft.Flow(names["velocity"]), names["noise"], "H200")
    assert jnp.sqrt(jnp.mean((names["data"] - fine) ** 2)) < 0.1


def test_the_class_to_image_example_gives_digits(standard_promotion):
    names = run("ClassToImage")
    assert names["images"].shape == (10, 8, 8, 1)
    assert names["images"].dtype == jnp.uint8


@pytest.mark.slow
def test_the_example_of_tasks_edits_digits(standard_promotion):
    (example,) = re.findall(r"```python\n(.*?)```", TASKS, re.DOTALL)
    names: dict = {}
    exec(compile(example, "docs/tasks.md", "exec"), names)
    for name in ("edited", "closer", "inpainted", "removed", "again"):
        assert names[name].shape == (3, 8, 8, 1)
    np.testing.assert_array_equal(names["inpainted"][:, :4], names["images"][:, :4])


def test_every_file_readme_points_to_exists():
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", README) + re.findall(r'src="([^"]+)"', README)
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert links
    assert missing == []


def test_readme_shows_the_two_commands():
    assert "pip install -r requirements.txt && python sample.py" in README
    assert "pip install -r requirements.txt && python -m pytest" in README
