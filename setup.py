"""What pyproject.toml cannot say: configs/, at the top of the tree, is the package mixtralkit.configs of a wheel."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mixtralkit", "mixtralkit.*", "lab"]), "mixtralkit.configs"],
    package_dir={"mixtralkit.configs": "configs"},
    package_data={
        "mixtralkit.configs": ["*/*"],
        "mixtralkit.ops.cpu": ["*.cpp", "*.h"],
        "mixtralkit.server": ["*.html"],
    },
)
