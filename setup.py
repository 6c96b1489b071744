"""What `pyproject.toml` cannot say: a wheel is the library alone; a checkout installed with -e is the pipeline too."""

import os

from setuptools import find_packages, setup

COMMAND = ["qadapter = qadapter.command.parser:main"]

if os.environ.get("QADAPTER_CHECKOUT"):  # installing/backend.py
    setup(
        packages=find_packages(include=["qadapter*", "tasks*", "flows*"]),
        entry_points={
            "console_scripts": COMMAND,
            "prefect.plugins": ["qadapter-deployments = flows.prefect_host.deployment_names"],
            "mlflow.app": ["qadapter = flows.commands.mlflow_app:create_app"],
        },
    )
else:
    setup(
        packages=[*find_packages(include=["qadapter*"]), "qadapter.configs"],
        package_dir={"qadapter.configs": "configs"},
        entry_points={"console_scripts": COMMAND},
    )
