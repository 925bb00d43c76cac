"""The sample blocks: one step each, pure functions `(flow, state, t, t_next) -> State`.

What a block hands on in `State.memory` is what the next block starts from. Times may be Moments: a
block only takes their difference, and hands them to the flow. Formulas write dt for t_next - t, f
for `flow.drift` and m for the memory. Source: PAPER section 2.
"""

import jax

from flowturbo_jax.interfaces import Flow, Memory, Moment, State, Time


def euler(flow: Flow, state: State, t: Time | Moment, t_next: Time | Moment) -> State:
    """E: x + dt f(m0), m0 evaluated at (x, t); hands on m0. One predictor evaluation."""
    m0 = flow.predict(state.x, t)
    return State(state.x + (t_next - t) * flow.drift(m0), m0)


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
    return State(state.x + dt / 2 * (d0 + flow.drift(m1)), m1)


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
    return State(state.x + dt / 2 * (d0 + flow.drift(m1)), m0)


def _add(memory: Memory, offset: Memory) -> Memory:
    return jax.tree.map(lambda a, b: a + b, memory, offset)
