"""FlowTurbo in JAX: frozen flow-matching image generators, sampled several times faster."""
