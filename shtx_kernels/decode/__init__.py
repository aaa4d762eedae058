"""Fused ops of one token of every sequence: what a CUDA graph of a model's step is made of."""
