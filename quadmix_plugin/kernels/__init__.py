"""Compiled kernels: ``cpu`` and ``normalise`` by numba, ``gpu`` by Triton; ``arrays`` is the same in numpy or cupy."""
