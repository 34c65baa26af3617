"""Which packages a wheel holds; everything else about the project is in pyproject.toml."""

from setuptools import find_packages, setup

converter = find_packages(include=["convert", "convert.*"])
setup(
    # The converter is never a top-level module once installed.
    packages=[
        *find_packages(include=["mlx_fastvlm", "mlx_fastvlm.*"]),
        *find_packages(include=["mlx_mobileclip", "mlx_mobileclip.*"]),
        *(f"mlx_fastvlm.{package}" for package in converter),
    ],
    package_dir={"mlx_fastvlm.convert": "convert"},
)
