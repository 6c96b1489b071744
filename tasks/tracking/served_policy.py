"""Models-from-code: MLflow stores a copy of this file with a logged model and runs it to load the model.

It imports `qadapter` only, whose source `tasks/tracking/models.py` stores with it; nothing is pickled.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class ServedPolicy(PythonModel):
    """A base with an adapter, which answers chat messages with an OpenAI chat completion."""

    def load_context(self, context: Any) -> None:
        """Load base and adapter from the model's folder; a base with a hub id is loaded from the hub.

        Raises:
            DamagedError: their files have changed since they were logged.
        """
        from qadapter.serving.generator import Generator
        from qadapter.serving.policies import ServedPolicies
        from qadapter.serving.registered import refuse_damage

        config = context.model_config
        for part, folder in context.artifacts.items():
            refuse_damage(Path(folder), config.get(f"{part}_digest"), f"{part} of {config['name']!r}")
        base = context.artifacts.get("base") or config["base"]
        self._name = str(config["name"])
        numerics = {key: config[key] for key in ("dtype", "quantization", "revision") if key in config}
        adapters = {self._name: Path(context.artifacts["adapter"])}
        self._generator = Generator(ServedPolicies.load(adapters, base, **numerics))

    # MLflow takes type hints here for a schema; the logged model has a signature of its own.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Answer one conversation.

        Args:
            context: the context that MLflow passes.
            model_input: one row with `messages`.
            params: fields of `qadapter.serving.protocol.ChatRequest`, null if not given.

        Returns:
            OpenAI's chat completion, a dict.

        Raises:
            MlflowException: a request that cannot be answered; the server makes a 400 of it. After a fault of the model
                itself a 500, which says nothing of this machine.
        """
        from pydantic import ValidationError

        from qadapter.serving.protocol import ChatRequest, RequestError, prepare

        rows = list(model_input["messages"])
        given = {name: value for name, value in (params or {}).items() if value not in (None, [])}
        try:
            if len(rows) != 1:
                raise RequestError(f"{len(rows)} conversations were sent; expected one.")
            messages = [{**message} for message in rows[0]]
            request = ChatRequest.model_validate({"model": self._name, **given, "messages": messages})
            prepared = prepare(request, self._generator)
            work = self._generator.submit(
                prepared.turns, prepared.prompt, prepared.sampling, tokenizer=prepared.tokenizer
            )
            return prepared.completion(work.result())
        except (RequestError, ValidationError) as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        except Exception:
            # For any other exception, MLflow returns the traceback, with paths of this machine and lines of code.
            logging.getLogger(__name__).exception("A request could not be answered")
            raise MlflowException("The model could not answer; the server's log says why.") from None


set_model(ServedPolicy())
