"""Triton kernels for the functions in the parent folder; imported only if fettle.ops.dispatch chooses them."""
