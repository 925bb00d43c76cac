"""Networks, parameters and the core joined: condition, noise, sampler, decode."""
