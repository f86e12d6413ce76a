"""The one thing that pyproject.toml cannot say yet in a stable way: the CPU kernels, in plain C without headers of torch.

Optional: where no compiler is found, torch itself does the same work. Not linked with an OpenMP runtime: the one that torch
has loaded is used, since the threads of two would spin against each other.
"""

from setuptools import Extension, setup

_FOLDER = "src/inferflux_backend_torch/native"

setup(
    ext_modules=[
        Extension(
            "inferflux_backend_torch._native",
            sources=[f"{_FOLDER}/module.c"],
            depends=[f"{_FOLDER}/kernels.c", f"{_FOLDER}/noise.c"],
            extra_compile_args=["-O3", "-fopenmp", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math"],
            optional=True,
        )
    ]
)
