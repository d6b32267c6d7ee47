"""Triton kernels of the functions one folder up; imported only where fettle.ops.dispatch says so."""
