"""The sample blocks: one step each, pure functions `(flow, state, t, t_next) -> State`.

What a block hands on in `State.memory` is what the next block starts from. Where the state has a
history, each block adds the memory that it starts from itself, of the velocity at t. Times may be
Moments: a block only takes their difference, and hands them to the flow. Formulas write dt for
t_next - t, f for `flow.drift` and m for the memory. Source: PAPER section 2.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flowturbo_jax.interfaces import Flow, Memory, Moment, State, Time

Weights = Float[Array, " remembered"]


def euler(flow: Flow, state: State, t: Time | Moment, t_next: Time | Moment) -> State:
    """E: x + dt f(m0), m0 evaluated at (x, t); hands on m0. One predictor evaluation."""
    m0 = flow.predict(state.x, t)
    return State(state.x + (t_next - t) * flow.drift(m0), m0, _recorded(state, m0))


def heun(flow: Flow, state: State, t: Time | Moment, t_next: Time | Moment) -> State:
    """H: Heun's method, two predictor evaluations; hands on the one at the predicted point.

    m0 = predict(x, t); m1 = predict(x + dt f(m0), t + dt); x + dt/2 (f(m0) + f(m1)); hands on m1.

    Source: FlowTurbo eq. 14-15, algorithm 1; handing on m1 follows models_assemble.py.
    """
    m0 = flow.predict(state.x, t)
    return _trapezoid(flow, state, m0, t, t_next)


def pseudo_corrector(flow: Flow, state: State, t: Time | Moment, t_next: Time | Moment) -> State:
    """P: Heun's method whose first velocity is the remembered one; one predictor evaluation.

    Second order like Heun, for half its cost. Its predicted points are the iterates of two-step
    Adams-Bashforth.

    Source: FlowTurbo algorithm 2 and appendix B.
    """
    return _trapezoid(flow, state, flow.recall(state.memory, t), t, t_next)


def _trapezoid(
    flow: Flow, state: State, m0: Memory, t: Time | Moment, t_next: Time | Moment
) -> State:
    dt = t_next - t
    d0 = flow.drift(m0)
    m1 = flow.predict(state.x + dt * d0, t_next)
    return State(state.x + dt / 2 * (d0 + flow.drift(m1)), m1, _recorded(state, m0))


def refine(
    flow: Flow, state: State, t: Time | Moment, t_next: Time | Moment, *, chained: bool = False
) -> State:
    """R: Heun's method with both velocities from the refiner; no predictor evaluation.

    m0 = m + refine(x, t, m); m1 = m0 + refine(x + dt f(m0), t + dt, n); x + dt/2 (f(m0) + f(m1));
    hands on m0. The rule `code` has n = m, the remembered one, the rule `chained` n = m0.

    Args:
      flow: the flow, with a refiner.
      state: x and the memory m that the block before handed on.
      t: flow time of x.
      t_next: flow time to reach.
      chained: the rule `chained` of the official transport/integrators.py, block Rc. The default
        is the rule `code` of models_assemble.py, which the published numbers come from.

    Returns:
      The state at t_next.
    """
    dt = t_next - t
    memory = flow.recall(state.memory, t)
    m0 = _add(memory, flow.refine(state.x, t, memory))
    d0 = flow.drift(m0)
    offset = flow.refine(state.x + dt * d0, t_next, m0 if chained else memory)
    m1 = flow.recall(_add(m0, offset), t_next)
    return State(state.x + dt / 2 * (d0 + flow.drift(m1)), m0, _recorded(state, m0))


def multistep(
    flow: Flow, state: State, t: Time | Moment, t_next: Time | Moment, weights: Weights
) -> State:
    """A and S: x + dt sum_j w_j f(m_j), the newest m_j evaluated at (x, t); hands that on.

    One predictor evaluation. Adams-Bashforth's weights make A2, A3 and A4 of it, learnt ones S.

    Args:
      flow: the flow.
      state: x, and the history that the blocks before recorded.
      t: flow time of x.
      t_next: flow time to reach.
      weights: w `[K]`, of the newest K memories, the newest last; they sum to 1.

    Returns:
      The state at t_next.

    Source: Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", III.1; searched
      weights are those of Wang et al. 2025, "Differentiable Solver Search for Fast Diffusion
      Sampling".
    """
    return _combined(flow, state, flow.predict(state.x, t), t, t_next, weights)


def refined_multistep(
    flow: Flow, state: State, t: Time | Moment, t_next: Time | Moment, weights: Weights
) -> State:
    """R beside S: as S, but the newest memory is m + refine(x, t, m), m being the one handed on.

    One refiner evaluation, and no predictor evaluation. Arguments and result as of `multistep`.
    """
    memory = flow.recall(state.memory, t)
    refined = _add(memory, flow.refine(state.x, t, memory))
    return _combined(flow, state, refined, t, t_next, weights)


def _combined(
    flow: Flow,
    state: State,
    m0: Memory,
    t: Time | Moment,
    t_next: Time | Moment,
    weights: Weights,
) -> State:
    history = _recorded(state, m0)
    velocities = jax.vmap(lambda memory: flow.drift(flow.recall(memory, t)))(history)
    weights = weights.astype(state.x.dtype).reshape(-1, *(1 for _ in state.x.shape))
    # A product and a sum: a matrix product would be rounded to fewer bits on accelerators.
    return State(state.x + (t_next - t) * (weights * velocities).sum(0), m0, history)


def _recorded(state: State, m0: Memory) -> Memory | None:
    """The history with the memory that this step starts from; the oldest one goes."""
    if state.history is None:
        return None
    return jax.tree.map(lambda past, new: jnp.concatenate([past[1:], new[None]]), state.history, m0)


def _add(memory: Memory, offset: Memory) -> Memory:
    return jax.tree.map(lambda a, b: a + b, memory, offset)
