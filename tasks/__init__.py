"""Prefect tasks: caching, retries and MLflow logging around one call into `qadapter`."""
