"""What `pyproject.toml` cannot say: a wheel holds two top-level folders of data inside the package."""

from setuptools import find_packages, setup

DATA = ("workloads", "tuning_logs")

setup(
    packages=[*find_packages(include=["tunebench", "tunebench.*"]), *(f"tunebench.{name}" for name in DATA)],
    package_dir={f"tunebench.{name}": name for name in DATA},
)
