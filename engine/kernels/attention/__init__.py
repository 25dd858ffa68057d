"""Attention over a paged KV pool: README.md has the maths, `reference` the meaning, `kernels` the speed."""
