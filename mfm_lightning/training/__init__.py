"""Sharded training: weights, gradients and optimiser state over several devices."""
