"""Where the two packages lie: `zeroi2v` (the library) and `zeroi2v_kernels` (its GPU ops).

Everything else about them stands in `pyproject.toml`.
"""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["zeroi2v*"]) + find_packages("kernels"),
    package_dir={"zeroi2v_kernels": "kernels/zeroi2v_kernels"},
)
