"""The counted cost of networks: what papers print, and cases small enough to count by hand."""

import jax
import jax.numpy as jnp
import pytest

from flowturbo_jax.cost import multiply_adds, parameter_count
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.model_directory import abstract_params
from flowturbo_jax.models import SiT, SiTConfig

# DiT, arXiv 2212.09748, table 4, "Gflops": multiply-adds of the networks that SiT inherited.
DIT_GFLOPS = {
    "SiT-S/8": 0.36,
    "SiT-S/4": 1.41,
    "SiT-S/2": 6.06,
    "SiT-B/8": 1.42,
    "SiT-B/4": 5.56,
    "SiT-B/2": 23.01,
    "SiT-L/8": 5.01,
    "SiT-L/4": 19.70,
    "SiT-L/2": 80.71,
    "SiT-XL/8": 7.39,
    "SiT-XL/4": 29.05,
    "SiT-XL/2": 118.64,
}
# Millions of parameters of the official SiT networks.
MILLIONS = {"SiT-S/2": 33.0, "SiT-B/2": 130.5, "SiT-L/2": 458.1, "SiT-XL/2": 675.13}


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def published(name):
    return SiTConfig.named(name, input_size=32, in_channels=4, num_classes=1000)


def sit_cost(config, rows=1, **options):
    """Multiply-adds of one evaluation."""
    module = SiT(config, **options)
    channels = config.in_channels * config.in_channels_scale
    x = floats(rows, config.input_size, config.input_size, channels)
    labels = jax.ShapeDtypeStruct((rows,), jnp.int32)

    def evaluate(params, x, t, labels):
        return module.apply({"params": params}, x, t, labels)

    return multiply_adds(evaluate, abstract_params(module), x, floats(), labels)


@pytest.mark.parametrize("name", DIT_GFLOPS)
def test_a_network_costs_what_the_dit_paper_prints(name):
    config = published(name)
    tokens = (config.input_size // config.patch_size) ** 2
    # The paper's counter adds one per normalised value: two normalisations a block, one at the end.
    normalised = (2 * config.depth + 1) * tokens * config.hidden_size
    counted = (sit_cost(config) + normalised) / 1e9
    # Two decimals are printed, and not all of them rounded: B/4 is 5.566 here and 5.56 there.
    assert abs(counted - DIT_GFLOPS[name]) < 0.01


@pytest.mark.parametrize("name", MILLIONS)
def test_a_network_has_the_published_number_of_parameters(name):
    digits = 2 if name == "SiT-XL/2" else 1
    count = parameter_count(abstract_params(SiT(published(name))))
    assert round(count / 1e6, digits) == MILLIONS[name]


def test_predictor_and_refiner_cost_what_flowturbo_prints():
    predictor = published("SiT-XL/2")
    refiner = predictor.refiner()
    assert round(parameter_count(abstract_params(SiT(refiner))) / 1e6, 2) == 29.71
    costs = [sit_cost(config) / 1e9 for config in (predictor, refiner)]
    assert [round(cost, 2) for cost in costs] == [118.62, 4.26]
    # FlowTurbo's results table: "GFLOPs" of H8, H15 and H2P4R2 for one guidance branch.
    schedules = {1898: (16, 0), 3559: (30, 0), 957: (8, 2)}  # evaluations of either network
    for total, (predictions, refinements) in schedules.items():
        assert round(predictions * costs[0] + refinements * costs[1]) == total


def test_the_cost_of_a_network_does_not_depend_on_how_it_is_laid_out():
    config = SiTConfig(8, 4, 2, hidden_size=16, depth=3, num_heads=2, num_classes=3)
    cost = sit_cost(config)
    assert sit_cost(config, unroll=True) == sit_cost(config, remat=True) == cost
    assert sit_cost(config, rows=5) == 5 * cost


def test_parameters_are_counted_alike_in_arrays_and_in_shapes():
    params = {"a": jnp.zeros((3, 4)), "b": {"c": jnp.zeros(()), "d": jnp.zeros((0, 7))}}
    assert parameter_count(params) == 13
    assert parameter_count(jax.eval_shape(lambda: params)) == 13
    assert parameter_count({}) == 0


@pytest.mark.parametrize(
    ("subscripts", "shapes", "count"),
    [
        ("ij,jk->ik", [(2, 3), (3, 5)], 2 * 3 * 5),
        ("i,i->", [(7,), (7,)], 7),
        ("i,j->ij", [(2,), (3,)], 2 * 3),
        ("bij,bjk->bik", [(4, 2, 3), (4, 3, 5)], 4 * 2 * 3 * 5),
        ("bihc,bjhc->bhij", [(2, 6, 3, 5), (2, 7, 3, 5)], 2 * 3 * 6 * 7 * 5),
        ("ijk,jkl->il", [(2, 3, 4), (3, 4, 5)], 2 * 3 * 4 * 5),
    ],
)
def test_a_matrix_product_costs_outputs_times_contracted_length(subscripts, shapes, count):
    def contract(*operands):
        return jnp.einsum(subscripts, *operands)

    assert multiply_adds(contract, *(floats(*shape) for shape in shapes)) == count


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 2 * (8 * 6) * (3 * 3 * 4 * 12)),
        ({"window_strides": (2, 2)}, 2 * (4 * 3) * (3 * 3 * 4 * 12)),
        ({"padding": "VALID"}, 2 * (6 * 4) * (3 * 3 * 4 * 12)),
        ({"feature_group_count": 2}, 2 * (8 * 6) * (3 * 3 * 2 * 12)),
        ({"feature_group_count": 4}, 2 * (8 * 6) * (3 * 3 * 1 * 12)),
        ({"batch_group_count": 2}, 1 * (8 * 6) * (3 * 3 * 4 * 12)),
        ({"rhs_dilation": (2, 2)}, 2 * (8 * 6) * (3 * 3 * 4 * 12)),
    ],
)
def test_a_convolution_costs_kernel_taps_per_output(options, count):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            **{"window_strides": (1, 1), "padding": "SAME", **options},
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    inputs = 4 // options.get("feature_group_count", 1)
    assert multiply_adds(convolve, floats(2, 8, 6, 4), floats(3, 3, inputs, 12)) == count


SQUARE = floats(8, 8)
ONE = 8 * 8 * 8  # multiply-adds of one product of two squares


def square(a):
    return a @ a


@jax.custom_vjp
def with_own_gradient(a):
    return a @ a


with_own_gradient.defvjp(lambda a: (a @ a, a), lambda a, g: (g @ a @ a,))


@jax.custom_jvp
def with_own_derivative(a):
    return a @ a


with_own_derivative.defjvp(lambda a, da: (a[0] @ a[0], da[0] @ a[0] @ a[0]))


def repeated(a):
    return jax.lax.scan(lambda carry, _: (carry @ a, None), a, length=5)[0]


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (lambda a: a + a, 0),
        (square, 1),
        (lambda a: square(square(a)), 2),
        (jax.jit(square), 1),
        (jax.checkpoint(square), 1),
        (jax.named_call(square), 1),
        (with_own_gradient, 1),
        (with_own_derivative, 1),
        (jax.vmap(lambda row: row @ row), 1 / 8),
        (repeated, 5),
        (lambda a: jax.lax.scan(lambda c, _: (repeated(c), None), a, length=3)[0], 15),
        (lambda a: jax.lax.fori_loop(0, 4, lambda _, carry: carry @ a, a), 4),
        (lambda a: jax.lax.map(lambda row: a @ row, a), 1),
        (lambda a: jax.lax.cond(a[0, 0] > 0, square, lambda a: square(square(a)), a), 2),
        (lambda a: jax.lax.switch(1, [lambda a: a, repeated, square], a), 5),
        (jax.jit(jax.grad(lambda a: jnp.sum(jnp.sin(a @ a)))), 3),
    ],
)
def test_products_are_counted_wherever_they_are_and_as_often_as_they_run(function, products):
    assert multiply_adds(function, SQUARE) == products * ONE


def test_arguments_are_arrays_or_shapes_in_any_tree():
    def apply(params, x):
        return x @ params["kernel"]

    assert multiply_adds(apply, {"kernel": SQUARE}, jnp.ones((8, 8))) == ONE


def test_a_while_loop_is_refused_unless_it_multiplies_nothing():
    def grow(a):
        return jax.lax.while_loop(lambda a: jnp.sum(a) < 9, lambda a: a * 2, a)

    def multiply(a):
        return jax.lax.while_loop(lambda a: jnp.sum(a) < 9, square, a)

    assert multiply_adds(lambda a: square(grow(a)), SQUARE) == ONE
    with pytest.raises(InputError, match=r"while loop: how often it runs .* jax\.lax\.scan"):
        multiply_adds(multiply, SQUARE)
    with pytest.raises(InputError, match="while loop"):
        multiply_adds(jax.jit(lambda a: multiply(a) + a), SQUARE)


def test_an_unknown_wrapper_is_refused_rather_than_guessed():
    def solve(a):
        return jax.lax.custom_linear_solve(square, a, solve=lambda _, b: b @ b)

    with pytest.raises(InputError, match="'custom_linear_solve'"):
        multiply_adds(solve, SQUARE)
