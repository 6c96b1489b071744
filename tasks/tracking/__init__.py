"""MLflow: its store, runs, logged models and registry.

MLflow decides at import whether it sends telemetry. All modules that import it lie in this package, which is imported
first: telemetry is off unless the user sets the variable.
"""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
