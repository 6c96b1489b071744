"""The settings of a judge behind an OpenAI-compatible endpoint: a section of a config, and what its client needs."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from qadapter.config.base import Count, NonNegative, Positive, Settings

NAME = "endpoint"

KEY_VARIABLE = "OPENAI_API_KEY"
"""The only variable without the project's prefix that a config may send to a judge."""


class EndpointSettings(Settings):
    """A judge behind an OpenAI-compatible endpoint, and its budget.

    Attributes:
        url: the endpoint's base, such as `https://api.openai.com/v1`; `/chat/completions` is added.
        model: the judge's name there.
        api_key_variable: name of the environment variable with the key; None for a server without keys. Configs never
            contain the key itself.
        input_price, output_price: price per million tokens; required for an estimate and for a budget.
        budget: largest total cost, in the prices' currency; None: no limit. An experiment's budget is divided equally
            between its rows.
        runs: number of flow runs that the experiment is divided into, and the budget with it (`qadapter spread` sets
            it).
        max_output_tokens: longest answer of the judge in tokens.
        timeout: seconds per attempt.
        retries: number of retries after a temporary failure.
        backoff: seconds before the first retry; each further wait is twice as long.
        parallel: number of concurrent calls.
        extra: further fields of the request body; null removes one (some models refuse `temperature`).
    """

    url: str
    model: str
    api_key_variable: str | None = KEY_VARIABLE
    input_price: NonNegative | None = None
    output_price: NonNegative | None = None
    budget: NonNegative | None = None
    runs: Count = 1
    max_output_tokens: Count = 64
    timeout: Positive = 60.0
    retries: Annotated[int, Field(ge=0)] = 4
    backoff: NonNegative = 1.0
    parallel: Count = 4
    extra: dict[str, Any] = {}
