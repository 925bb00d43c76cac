"""What a benchmark measures: its clock, its ceiling, its parts, its counts, and fresh processes."""

import json
from functools import partial
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import flowturbo_jax as ft
from flowturbo_jax import cost, model_directory
from flowturbo_jax.interfaces import InputError, State
from flowturbo_jax.model_directory import Model, abstract_params, modules
from flowturbo_jax.pipelines import (
    ablation,
    benchmark,
    ceiling,
    cold_start,
    part_programs,
    programs,
    time_split,
)
from flowturbo_jax.pipelines.batch_call import BatchCall, Compiled
from flowturbo_jax.pipelines.random_model import random_model
from flowturbo_jax.pipelines.subject import Subject
from flowturbo_jax.pipelines.time_split import Split
from flowturbo_jax.pipelines.timing import Stopwatch, Task, Times
from flowturbo_jax.quantization import quantize
from flowturbo_jax.sampler import BLOCKS
from flowturbo_jax.schedule import Schedule

SMALLEST = Subject(None, "SiT-S/8", image_size=64, vae=False)
COMPILED = "/jax/core/compile/backend_compile_duration"


def tiny_model():
    """As tiny.save_model's, in memory, and without compiling anything."""
    description, rng = tiny.description(), np.random.default_rng(0)

    def drawn(shape):
        return 0.2 * rng.standard_normal(shape.shape, np.float32)

    built = modules(description)
    params = {
        f"{name}_params": jax.tree.map(drawn, abstract_params(module))
        for name, module in built.items()
    }
    return Model(description, **built, **params)


def save_tiny_model(directory):
    made = tiny_model()
    params = (made.predictor_params, made.refiner_params)
    model_directory.save(directory, made.description, *params)
    return directory


@pytest.fixture(scope="module")
def pipe():
    return ft.ClassToImage(tiny_model())


@pytest.fixture(scope="module")
def latents_alone():
    """A model of latents that nothing decodes."""
    return SMALLEST.load("float32")


class FakeTime:
    """A clock that only the calls it is handed to move on."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def clock(self):
        return self.now

    def call(self, name, seconds):
        """A call that takes so long."""

        def run():
            self.calls.append(name)
            self.now += next(seconds) if hasattr(seconds, "__next__") else seconds
            return np.zeros(1)

        return run


@pytest.mark.parametrize(("seconds", "repeats"), [(0.5, 10), (2.0, 5), (60.0, 3)])
def test_a_slow_call_is_repeated_less_but_three_times(seconds, repeats):
    time = FakeTime()
    found = Stopwatch(10, 10.0, time.clock).latency(time.call("a", seconds))
    assert found == Times(seconds, seconds, repeats)
    assert len(time.calls) == 1 + repeats  # the first compiles


def test_the_median_counts_and_the_first_call_does_not():
    time = FakeTime()
    call = time.call("a", iter([100.0, 1.0, 5.0, 2.0, 3.0, 9.0]))
    assert Stopwatch(5, clock=time.clock).latency(call) == Times(3.0, 1.0, 5)


def test_quick_calls_are_timed_many_at_once():
    time = FakeTime()
    found = Stopwatch(3, clock=time.clock).back_to_back(time.call("a", 1 / 64))
    assert found == Times(1 / 64, 1 / 64, 3)
    in_burst = int(0.1 * 64)
    assert len(time.calls) == 2 + 3 * in_burst  # one compiles, one says how many make a burst


def test_tasks_are_measured_in_turn():
    time = FakeTime()
    tasks = [Task(time.call(name, 1.0), until_on_host=True) for name in "abc"]
    found = Stopwatch(3, clock=time.clock).in_turn(*tasks)
    assert found == [Times(1.0, 1.0, 3)] * 3
    assert "".join(time.calls[6:]) == "abcabc"


def test_the_ceiling_is_products_over_time():
    ticks = count(step=0.25)  # so every interval takes a quarter of a second
    found = ceiling.measure(jnp.float32, Stopwatch(clock=lambda: next(ticks)), sizes=(16, 32))
    flop = {side: 2 * side**3 * ceiling.PRODUCTS for side in (16, 32)}
    assert found.by_size == {side: flop[side] / 0.25 for side in (16, 32)}
    assert found.flop_per_second == flop[32] / 0.25


def test_the_ceiling_multiplies_as_often_as_it_says():
    left, right = np.random.default_rng(0).standard_normal((2, 8, 8)).astype(np.float32) / 3
    product = ceiling.chained_products(jnp.asarray(left), jnp.asarray(right))
    wanted = left @ np.linalg.matrix_power(right, ceiling.PRODUCTS)
    np.testing.assert_allclose(product, wanted, rtol=1e-4, atol=1e-6)  # rounding of 8 products
    assert cost.multiply_adds(ceiling.chained_products, left, right) == 8**3 * ceiling.PRODUCTS


SCHEDULES = ("H8", "H1P5R3", "P2R1", "E3", "H1P1Rc2@0.5", "(H1P1R1)x2")


@pytest.mark.parametrize("text", SCHEDULES)
def test_evaluations_are_where_the_blocks_evaluate(text):
    schedule, asked = Schedule.parse(text), {"predictor": [], "refiner": []}

    def predict(x, t):
        asked["predictor"].append(float(t))
        return x

    def refine(x, t, memory):
        asked["refiner"].append(float(t))
        return x

    flow, grid = ft.Flow(predict, refine), jnp.asarray(schedule.times())
    x = jnp.ones(2)
    state = State(x, predict(x, grid[0]) if schedule.runs[0].block == "P" else None)
    for run, first, last in schedule.intervals():
        for i in range(first, last):
            state = BLOCKS[run.block](flow, state, grid[i], grid[i + 1])
    found = time_split.evaluations(schedule)
    assert {name: [float(grid[i]) for i in indices] for name, indices in found.items()} == asked
    assert len(found["predictor"]) == schedule.predictor_evaluations
    assert len(found["refiner"]) == schedule.refiner_evaluations


def test_an_interval_has_both_branches_in_it_and_one_outside(pipe):
    inside, outside = time_split.rows(pipe.plan("H8", 2.0, "paired", (0.25, 0.5)))
    assert inside == ("predictor", 2, (2, 2, 3, 3, 4, 4))
    assert outside == ("predictor", 1, (0, 1, 1, 5, 5, 6, 6, 7, 7, 8))
    (alone,) = time_split.rows(pipe.plan("H8", None, "none"))
    assert (alone.branches, len(alone.indices)) == (1, 16)


def prepared_evaluation(pipe, branches):
    """Multiply-adds of one predictor evaluation of two images, without conditioning."""
    description = pipe.model.description
    module, rows = modules(description)["predictor"], 2 * branches
    labels = jnp.zeros(rows, jnp.int32)
    variables = {"params": pipe.params[0]}
    at = module.apply(variables, jnp.zeros(1), labels, rows, method="prepare")
    x = jnp.zeros((rows, *description.predictor.shape))
    at = jax.tree.map(lambda leaf: leaf[0], at)
    return cost.multiply_adds(module.apply, variables, x, jnp.float32(0), at)


def test_eight_heun_steps_are_sixteen_evaluations_of_the_network_part(pipe):
    for guidance, branches in (("paired", 2), ("none", 1)):
        call = BatchCall(pipe, pipe.plan("H8", None, guidance), 2)
        names = [part.name for part in parts_of(call)]
        assert names == ["predictor", "conditioning", "guidance_and_steps", "decode"]
        assert parts_of(call)[0].multiply_adds == 16 * prepared_evaluation(pipe, branches)


def parts_of(call):
    return part_programs.parts(call, time_split.rows(call.plan))


def whole_program(call):
    """Multiply-adds of the traced sampler, with the networks that its schedule uses."""
    model, plan, params = call.pipe.model, call.plan, call.pipe.params
    networks = programs.Networks(model)
    if not plan.schedule.needs_refiner:
        networks.refiner, params = None, (params[0], None, *params[2:])
    static = {"networks": networks, "schedule": plan.schedule, "guidance": plan.guidance}
    given = (call.labels, *plan.arguments)
    if call.shows_images:
        function, start = programs.generate_images, (call.decoder_params, *call.start)
    else:
        function, start = programs.sample_latents, (call.start,)
    return cost.multiply_adds(partial(function, **static), params, *start, *given)


@pytest.mark.parametrize("guidance", ["paired", "official", "none"])
@pytest.mark.parametrize("schedule", ["H2", "H1P1R1", "P2R1"])
def test_the_parts_multiply_as_much_as_the_whole(pipe, schedule, guidance):
    call = BatchCall(pipe, pipe.plan(schedule, None, guidance), 2)
    assert sum(part.multiply_adds for part in parts_of(call)) == whole_program(call) > 0


def test_quantized_networks_count_as_the_ones_they_were_made_of(pipe):
    quantized = ft.ClassToImage(quantize(pipe.model, "int8"))
    plan = pipe.plan("H1R1")
    counts = [
        [part.multiply_adds for part in parts_of(BatchCall(p, plan, 2))] for p in (pipe, quantized)
    ]
    assert counts[0] == counts[1]
    jax.block_until_ready([part.call() for part in parts_of(BatchCall(quantized, plan, 2))])


def test_networks_of_twice_the_images_multiply_twice_as_much(pipe):
    plan = pipe.plan("H1P1R1")
    one, two = (
        {part.name: part.multiply_adds for part in parts_of(BatchCall(pipe, plan, size))}
        for size in (2, 4)
    )
    assert (two["predictor"], two["refiner"]) == (2 * one["predictor"], 2 * one["refiner"])


def test_what_is_guided_on_an_interval_multiplies_less(pipe):
    plan = pipe.plan("H2", 2.0, "paired", (0.0, 0.4))
    parts = parts_of(BatchCall(pipe, plan, 2))
    rows = {2: 1, 1: 3}  # the first evaluation is inside
    wanted = sum(count * prepared_evaluation(pipe, branches) for branches, count in rows.items())
    assert sum(part.multiply_adds for part in parts if part.name == "predictor") == wanted


def test_latents_alone_have_no_decode_part(latents_alone):
    call = BatchCall(latents_alone, latents_alone.plan("H1R1"), 1)
    assert call().dtype == jnp.float32
    parts = parts_of(call)
    assert "decode" not in [part.name for part in parts]
    assert sum(part.multiply_adds for part in parts) == whole_program(call)
    row, split = benchmark.measure_row(call, Stopwatch(repeats=1), None)
    assert benchmark.utilisation(split, 1e12)["decode"] is None
    assert row["split_ms_per_batch"]["decode"] == 0


class KnownTimes(Stopwatch):
    """A stopwatch that says what it is told."""

    def __init__(self, *medians):
        super().__init__()
        self.times = [Times(median, median, 1) for median in medians]

    def in_turn(self, *tasks):
        assert len(tasks) == len(self.times)
        return self.times


@pytest.mark.parametrize(
    ("device", "parts", "host", "rest"),
    [
        (7.0, (3.0, 1.0, 0.5, 0.25, 0.25), 1.0, 2.0),
        (7.0, (6.0, 1.0, 0.5, 0.25, 0.25), 1.0, -1.0),  # apart they are slower: shown as it is
        (9.0, (6.0, 1.0, 0.5, 0.25, 0.25), 0.0, 0.0),  # noise of the measurement
    ],
)
def test_host_and_rest_are_what_is_left(pipe, device, parts, host, rest):
    call = BatchCall(pipe, pipe.plan("H1R1"), 2)
    found = time_split.split(call, KnownTimes(8.0, device, *parts))
    assert list(found.seconds) == list(time_split.PARTS)
    assert list(found.seconds.values()) == [*parts, host, rest]
    assert found.flop == 2 * whole_program(call)


def test_the_parts_run_and_add_up_to_the_latency(pipe):
    plan = pipe.plan("H1R1", 2.0, "paired", (0.0, 0.4))
    found = time_split.split(BatchCall(pipe, plan, 2), Stopwatch(repeats=1))
    assert sum(found.seconds.values()) == pytest.approx(found.latency.median)
    assert min(s for part, s in found.seconds.items() if part != "rest") >= 0
    measured = ("predictor", "refiner", "conditioning", "guidance_and_steps", "decode")
    assert all(found.seconds[part] > 0 for part in measured)


def test_what_is_too_large_to_prepare_is_no_part(pipe, monkeypatch):
    monkeypatch.setattr("flowturbo_jax.sampler.PREPARED_BYTES", 0)
    part_programs.evaluate.clear_cache()
    call = BatchCall(pipe, pipe.plan("H1P1R1"), 2)
    parts = parts_of(call)
    assert "conditioning" not in [part.name for part in parts]
    assert sum(part.multiply_adds for part in parts) == whole_program(call)
    jax.block_until_ready([part.call() for part in parts])


def test_utilisation_is_operations_over_time_over_the_ceiling():
    seconds = dict.fromkeys(time_split.PARTS, 0.0) | {"predictor": 3.0, "refiner": 1.0}
    seconds |= {"decode": 0.5}
    work = {"predictor": 600, "refiner": 200, "conditioning": 40, "decode": 100}
    split = Split(Times(6.0, 6.0, 1), Times(5.0, 5.0, 1), seconds, work)
    found = benchmark.utilisation(split, 1000.0)
    assert found == pytest.approx(
        {
            "whole": 2 * 940 / 5 / 1000,
            "networks": 2 * 800 / 4 / 1000,
            "decode": 2 * 100 / 0.5 / 1000,
        }
    )
    split = split._replace(multiply_adds={"predictor": 600})
    assert benchmark.utilisation(split, 1000.0)["decode"] is None


@pytest.mark.parametrize(("schedule", "printed"), [("H8", 1898), ("H15", 3559), ("H24", 5694)])
def test_multiply_adds_are_the_paper_s_gflops(schedule, printed):
    found = benchmark.paper_gmac(Subject(None, "SiT-XL/2").describe(), Schedule.parse(schedule))
    assert abs(found - printed) < 0.5


def test_refiner_evaluations_count():
    whole, without = (
        benchmark.paper_gmac(tiny.description(), Schedule.parse(text)) for text in ("H1R1", "H1")
    )
    assert whole > without > 0


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        (None, None, (77, "compiler")),
        (None, 200, (200, "device")),
        (100, 200, (200, "device")),
        (200, 200, (77, "compiler")),  # what another program needed
    ],
)
def test_the_device_s_peak_is_a_program_s_only_where_it_rose(before, after, found):
    assert benchmark.peak_memory(before, after, Compiled(0.1, 0.2, 77)) == found


def test_what_was_compiled_is_what_calls_run(pipe):
    call, events = BatchCall(pipe, pipe.plan("H3"), 2), []

    def listen(event, seconds, **_):
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        compiled = call.compile_anew()
        assert COMPILED in events
        events.clear()
        jax.block_until_ready(call())
        assert COMPILED not in events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert min(compiled.trace_seconds, compiled.compile_seconds) > 0
    assert compiled.memory_bytes > sum(leaf.nbytes for leaf in jax.tree.leaves(pipe.params))


def test_a_size_is_described_as_it_is_made(latents_alone):
    for subject in (SMALLEST, SMALLEST._replace(vae=True)):
        made = random_model(subject.size, subject.image_size, subject.vae)
        assert subject.describe() == made.description


def test_a_report_has_a_row_for_each_schedule_and_batch(pipe, monkeypatch):
    def known(call, stopwatch):
        """Twice as long for H1 as for E1, but for calls that follow each other."""
        seconds = 0.5 * call.batch_size * call.plan.schedule.predictor_evaluations
        parts = dict.fromkeys(time_split.PARTS, seconds / len(time_split.PARTS))
        work = {"predictor": 1000, "decode": 24}
        return Split(Times(seconds, seconds, 7), Times(0.25, 0.25, 7), parts, work)

    ablated = dict.fromkeys(ablation.WAYS, Times(0.5, 0.25, 3))
    monkeypatch.setattr(time_split, "split", known)
    monkeypatch.setattr(ablation, "measure", lambda *_: ablated)
    rates = iter([{16: 1e5, 32: 5e5}, {16: 1e4, 32: 1e6}])  # before, and after
    monkeypatch.setattr(ceiling, "measure", lambda *_: ceiling.Ceiling(0.0, next(rates)))
    plans = [pipe.plan("H1"), pipe.plan("E1")]
    report = benchmark.measure(pipe, plans, [1, 2], Stopwatch(1), ablate=True)
    assert json.loads(json.dumps(report)) == report
    rows = report["rows"]
    named = [(row["schedule"], row["batch_size"]) for row in rows]
    assert named == [("H1", 1), ("E1", 1), ("H1", 2), ("E1", 2)]
    assert [row["speed_up"] for row in rows] == [1, 2, 1, 2]
    assert [row["ms_per_image"] for row in rows] == [1000, 500, 1000, 500]
    assert [row["ms_per_batch"] for row in rows] == [1000, 500, 2000, 1000]
    assert [row["images_per_second"] for row in rows] == [4, 4, 8, 8]
    for row in rows:
        assert sum(row["split_ms_per_batch"].values()) == pytest.approx(row["ms_per_batch"])
        assert (row["flop"], row["repeats"]) == (2048, 7)
        assert row["utilisation"]["whole"] == pytest.approx(2048 / 0.25 / 1e6)
        assert min(row["memory_bytes"], row["trace_seconds"], row["compile_seconds"]) > 0
    card = report["card"]
    assert {"device", "versions", "dtype", "predictor_sha256", "processor_cores"} <= card.keys()
    assert not {"schedule", "samples", "seed", "batch_size"} & card.keys()
    assert card["devices"] == 1  # of the four that the tests have
    assert report["ceiling"]["by_size"] == {"16": 1e5, "32": 1e6}
    assert report["ablation"] == [
        {"schedule": text, "batch_size": size, "ms_per_image": dict.fromkeys(ablated, 500 / size)}
        for size in (1, 2)
        for text in ("H1", "E1")
    ]


def test_the_ablation_runs_in_every_way(pipe):
    found = ablation.measure(pipe, pipe.plan("H1"), 1, Stopwatch(1))
    assert list(found) == list(ablation.WAYS)
    assert min(times.median for times in found.values()) > 0


@pytest.mark.parametrize("guidance", ["paired", "official", "none"])
@pytest.mark.parametrize("schedule", ["H1P1R1", "P1H1"])
def test_the_sampler_in_pieces_gives_the_same_latents(pipe, schedule, guidance):
    plan, labels = pipe.plan(schedule, None, guidance), jnp.asarray([3, 1], jnp.int32)
    noise = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    wanted = pipe.sample_latents(
        noise, labels, schedule=schedule, guidance_scale=plan.scale, guidance=guidance
    )
    networks = ablation.networks_apart(pipe, ablation.JittedNetwork)
    found = ablation.step_by_step(pipe, networks, noise, labels, plan)
    np.testing.assert_allclose(found, wanted, atol=1e-5)  # float32, other orders of sums


def test_an_interval_is_not_taken_apart(pipe):
    plan = pipe.plan("H1P1", 2.0, "paired", (0.0, 0.5))
    with pytest.raises(InputError, match="leave out --ablation or --guidance-interval"):
        ablation.check(plan)


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    model = Subject(str(save_tiny_model(tmp_path_factory.mktemp("model") / "m")))
    request = cold_start.Request(model, "float32", 2, "H1P1R1", 2.0, "paired")
    return request, cold_start.measure(request)


def test_the_first_process_finds_nothing_and_the_second_compiles_nothing(starts):
    _, (cold, warm) = starts
    assert cold.compiled > 0
    assert cold.loaded == 0
    assert warm.compiled == 0
    assert warm.loaded == cold.compiled


def test_a_start_is_reported_stage_by_stage(starts):
    report = benchmark.cold_start_report(*starts)
    assert json.loads(json.dumps(report)) == report
    for name in ("cold", "warm"):
        seconds = report[name]["seconds"]
        assert list(seconds) == list(cold_start.STAGES)
        assert min(seconds.values()) > 0
        assert report[name]["call_seconds"] == seconds["program"] + seconds["run"]
    ratio = report["warm"]["call_seconds"] / report["cold"]["call_seconds"]
    assert report["warm_over_cold"] == ratio


def test_a_process_that_fails_says_why(tmp_path):
    request = cold_start.Request(Subject(str(tmp_path / "nothing")), "float32", 1, "H1")
    with pytest.raises(InputError, match=r"a fresh process failed: .*no model directory at"):
        cold_start.start(request, tmp_path)
