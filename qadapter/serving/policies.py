"""The base and all adapters of a server in memory, and the policy behind each model name."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qadapter.config.model import ModelSettings
from qadapter.errors import QAdapterError
from qadapter.policy.adapter_rows import AdapterRows
from qadapter.policy.adapters import ADAPTER_FILE, adapter_place, base_of, load_adapter
from qadapter.policy.base import fit_tokenizer, load_config
from qadapter.policy.dial import AS_TRAINED, Dial
from qadapter.policy.files import SETTINGS_FILE, read_settings, saved_dial
from qadapter.policy.guided import GUIDE_FILE, GuidedForCausalLM
from qadapter.policy.loading import load_base
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.policy.objective import Objective
from qadapter.policy.positions import position_limit
from qadapter.policy.probe import can_be_probed, logits_of, probe_ids, refuse_other_base
from qadapter.policy.ranges import check_dials, check_weights
from qadapter.policy.tokenizer import difference, policy_tokenizer, training_record, unreadable_record

log = logging.getLogger(__name__)

BASE_NAME = "base"
"""The model name of the base itself."""


class UnknownModelError(QAdapterError):
    """The requested model does not exist on this server."""


@dataclass(frozen=True)
class Blend:
    """The distribution of a reply: softmax((Σ w_i Q_i + α0 · log π1)/α̃), each Q_i a difference to the base; dialled.

    Attributes:
        weights: name in PEFT → weight of the adapter; empty for the base itself.
        alpha_0: α0 of the residual form.
        alpha_tilde: α̃.
        dial: how much of the way from the base to that.
    """

    weights: Mapping[str, float]
    alpha_0: float = 1.0
    alpha_tilde: float = 1.0
    dial: Dial = AS_TRAINED


@dataclass(frozen=True)
class _Served:
    """One adapter folder: its own blend, and the difference between its α0 and that of the residual form."""

    blend: Blend
    shift: float


class ServedPolicies:
    """A base, its adapters, and the named blends of them.

    All adapters share one base in one policy of the residual form. A Q-Adapter of the form `absolute` with α0 is the
    residual one with α0 + 1, and a plain LoRA (SFT, DPO, replay) is one with α0 = α̃ = 1 (docs/method.md), so
    all of these can be served, and mixed, side by side. An adapter that guides the base's decoding (VAS, PITA) is
    served alone.

    Attributes:
        policy: the model; code inside `speaking` owns its adapter weights.
        tokenizer: the base's own.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        adapters: Mapping[str, Path],
        *,
        allow_base_mismatch: bool = False,
    ) -> None:
        """Put every adapter onto the base.

        Args:
            base: in evaluation mode; it is changed in place.
            tokenizer: the base's.
            adapters: model name to the folder that a training wrote.
            allow_base_mismatch: whether the base may be another one than they were trained on.

        Raises:
            QAdapterError: no adapter, a reserved name, or a folder without an adapter for this base.
        """
        _refuse_names(adapters)
        allowed = {"allow_base_mismatch": allow_base_mismatch}
        self.tokenizer = tokenizer
        self._tokenizers = {
            name: fit_tokenizer(policy_tokenizer(folder, tokenizer), base) for name, folder in adapters.items()
        }
        for name, own in self._tokenizers.items():
            if (other := difference(own, tokenizer)) is not None:
                log.warning("The adapter %s brings its own tokenizer, with %s; it is used.", name, other)
        self._served: dict[str, _Served] = {}
        self.policy: QAdapterForCausalLM | GuidedForCausalLM
        if guided := [name for name, folder in adapters.items() if (folder / GUIDE_FILE).is_file()]:
            if len(adapters) > 1:
                raise QAdapterError(
                    f"{guided[0]} guides the base's decoding ({GUIDE_FILE}) and shares no server with other adapters. "
                    "Serve it alone."
                )
            self._chooses_rows = False
            self._served[guided[0]] = _Served(Blend({"default": 1.0}), 0.0)
            self.policy = GuidedForCausalLM.from_pretrained(adapters[guided[0]], base, **allowed)
            return
        peft_model: PeftModel | None = None
        expected = logits_of(base, probe_ids(base)) if can_be_probed(base) else None
        for name, folder in adapters.items():
            weights: dict[str, float] = {}
            for place, weight in _places(folder).items():
                inner = f"served_{len(self._served)}_{len(weights)}"  # a name of PEFT's can hold no dot
                peft_model = load_adapter(peft_model or base, place, inner, **allowed)
                weights[inner] = weight
            self._served[name] = _describe(folder, weights)
        assert peft_model is not None
        first = next(iter(self._served.values())).blend
        self._chooses_rows = AdapterRows(peft_model).supported
        self._refuse_mixes(first.weights)
        self.policy = QAdapterForCausalLM(peft_model, Objective.preset("residual"), dict(first.weights)).eval()
        refuse_other_base(self.policy, expected)

    @classmethod
    def load(
        cls,
        adapters: Mapping[str, Path],
        base: str | Path | None = None,
        dtype: str | None = None,
        quantization: str | None = None,
        revision: str | None = None,
        allow_base_mismatch: bool = False,
    ) -> ServedPolicies:
        """Load the base, then as the constructor.

        Args:
            adapters: model name to folder.
            base: folder or hub id; by default the base in the first adapter's config.
            dtype: float32, bfloat16 or float16; by default that of the first adapter's training if recorded, otherwise
                that in the base's config.
            quantization: none, int8 or nf4 (the last two need bitsandbytes); by default as in that training, or none.
            revision: revision of a base on the hub, preferably a commit; by default that of the first adapter's
                training if its base is loaded, otherwise the current main branch.
            allow_base_mismatch: whether the base may be another one than the adapters were trained on.

        Raises:
            QAdapterError: as the constructor, or a base that cannot be loaded.
        """
        _refuse_names(adapters)
        folder = next(iter(adapters.values()))
        place = next(iter(_places(folder)))
        base_given = base is not None
        base = base or base_of(place)
        if not base:
            raise QAdapterError(f"The adapter in {folder} does not record its base. Give it with --base.")
        trained = training_record(folder)
        revision = revision or (None if base_given else trained.get("revision"))
        given = {
            "pretrained": str(base),
            "dtype": dtype or trained.get("dtype") or _dtype(str(base), revision),
            "quantization": quantization or trained.get("quantization") or "none",
            "revision": revision,
        }
        try:
            settings = ModelSettings.model_validate({**given, **(trained.get("model") or {})})
        except (ValidationError, TypeError) as error:
            raise unreadable_record(folder, error) from error
        return cls(*load_base(str(base), settings), adapters, allow_base_mismatch=allow_base_mismatch)

    @property
    def names(self) -> list[str]:
        """The models that a client can request: every adapter, and the base."""
        return [*self._served, BASE_NAME]

    @property
    def context(self) -> int:
        """Longest sequence of the base, prompt and reply together, in tokens."""
        return position_limit(self.policy.config) or 2**30

    @property
    def vocabulary(self) -> int:
        """Number of tokens with an embedding."""
        embeddings: Any = self.policy.get_input_embeddings()
        return int(embeddings.weight.shape[0])

    def tokenizer_of(self, name: str, mix: Mapping[str, float] | None = None) -> PreTrainedTokenizerBase:
        """The tokenizer for the prompts of a request: the adapter's own; for the base, the base's.

        Args:
            name: one of `names`.
            mix: weights of adapters in place of `name`.

        Raises:
            QAdapterError: the adapters of the mix were trained with different tokenizers or templates.
        """
        if not mix:
            return self._tokenizers.get(name, self.tokenizer)
        first, *others = [self._tokenizers[one] for one in mix]
        for one, other in zip(list(mix)[1:], others, strict=True):
            if other is not first and (found := difference(other, first)) is not None:
                raise QAdapterError(
                    f"{one} was trained with {found} than {next(iter(mix))}, so no prompt suits both. Request one of "
                    "them."
                )
        return first

    def blend(
        self,
        name: str,
        mix: Mapping[str, float] | None = None,
        alpha_0: float | None = None,
        alpha_tilde: float | None = None,
        dial: Dial | None = None,
    ) -> Blend:
        """Resolve a request to a blend.

        Args:
            name: one of `names`.
            mix: weights of adapters in place of `name`.
            alpha_0: α0; for one adapter in its own parametrisation, as in its `q_adapter.json`; for a mix in the
                residual form. By default the saved value; the adapters of a mix must agree on it.
            alpha_tilde: the same for α̃.
            dial: by default the saved one; the adapters of a mix must agree on it.

        Raises:
            UnknownModelError: no such name.
            QAdapterError: dials out of range, dials for the base, or a mix of adapters that cannot be mixed.
        """
        unknown = [one for one in (mix or {}) if one not in self._served]
        if unknown or name not in self.names:
            raise UnknownModelError(f"There is no model {(unknown or [name])[0]!r}; there are {', '.join(self.names)}.")
        if isinstance(self.policy, GuidedForCausalLM) and (mix or (alpha_0, alpha_tilde, dial) != (None, None, None)):
            raise QAdapterError(
                f"{next(iter(self._served))} guides the base's decoding: it has no dials and is not mixed. Remove "
                "dial, alpha_0, alpha_tilde and the mix."
            )
        if mix:
            own, shift = self._mixed(mix, alpha_0, alpha_tilde, dial), 0.0
        elif name == BASE_NAME:
            if (alpha_0, alpha_tilde, dial) != (None, None, None):
                raise QAdapterError(
                    "The base has no dials; remove dial, alpha_0 and alpha_tilde, or request an adapter."
                )
            return Blend({})
        else:
            own, shift = self._served[name].blend, self._served[name].shift
        chosen = Blend(
            own.weights,
            own.alpha_0 if alpha_0 is None else alpha_0 + shift,
            own.alpha_tilde if alpha_tilde is None else alpha_tilde,
            own.dial if dial is None else dial,
        )
        check_dials(chosen.alpha_0, chosen.alpha_tilde)
        check_weights(chosen.weights)
        return chosen

    def _mixed(
        self, mix: Mapping[str, float], alpha_0: float | None, alpha_tilde: float | None, dial: Dial | None
    ) -> Blend:
        parts = [self._served[name].blend for name in mix]
        weights: dict[str, float] = {}
        for blend, weight in zip(parts, mix.values(), strict=True):
            weights |= {inner: weight * own for inner, own in blend.weights.items()}
        self._refuse_mixes(weights)
        given = {"alpha_0": alpha_0, "alpha_tilde": alpha_tilde, "dial": dial}
        saved = [{name: getattr(blend, name) for name in given} for blend in parts]
        if open_ := [name for name in given if given[name] is None and len({one[name] for one in saved}) > 1]:
            raise QAdapterError(
                f"The adapters {', '.join(mix)} were saved with different dials, so a mix has no default. "
                f"Give {' and '.join(open_)}{' (α0 of the residual form)' if 'alpha_0' in open_ else ''}."
            )
        return Blend(weights, parts[0].alpha_0, parts[0].alpha_tilde, parts[0].dial)

    def _refuse_mixes(self, weights: Mapping[str, float]) -> None:
        if len(weights) > 1 and not self._chooses_rows:
            raise QAdapterError(
                "Several adapters at once need plain LoRA layers in all served adapters (no DoRA or other variant). "
                "Request one adapter."
            )

    @contextmanager
    def speaking(self, blend: Blend) -> Iterator[dict[str, Any]]:
        """Set the policy to this blend within the block; yields the dials for `policy.generate`.

        Not thread-safe: the weights are the policy's state.
        """
        if not any(blend.weights.values()):
            with self.policy.disable_adapter():
                yield {}
            return
        if isinstance(self.policy, GuidedForCausalLM):
            yield {}
            return
        if not self._chooses_rows:
            self.policy.peft_model.set_adapter(next(iter(blend.weights)), inference_mode=True)
        self.policy.set_adapter_weights(blend.weights)
        yield {"alpha_0": blend.alpha_0, "alpha_tilde": blend.alpha_tilde, "dial": blend.dial}


def _refuse_names(adapters: Mapping[str, Path]) -> None:
    if not adapters:
        raise QAdapterError("No adapter was given. Give at least one folder that a training wrote.")
    if BASE_NAME in adapters:
        raise QAdapterError(f"{BASE_NAME!r} is the name of the base itself. Give the adapter another name.")


def _places(folder: Path) -> dict[Path, float]:
    """The folders of a saved policy's PEFT adapters, and the weight of each.

    Raises:
        QAdapterError: there is no adapter, or its weights are not safetensors.
    """
    places = {folder: 1.0} if (folder / SETTINGS_FILE).is_file() else {adapter_place(folder): 1.0}
    if (folder / SETTINGS_FILE).is_file():
        saved = read_settings(folder).adapter_weights
        # PEFT's layout: the adapter `default` is in the folder itself, others are below it
        places = {folder if name == "default" else folder / name: weight for name, weight in saved.items() if weight}
    for place in places:
        if not (place / ADAPTER_FILE).is_file():
            raise QAdapterError(
                f"{place} has no adapter: there is no {ADAPTER_FILE}. Give a folder that a training wrote; "
                "weights of another kind are not loaded."
            )
    return places


def _describe(folder: Path, weights: Mapping[str, float]) -> _Served:
    if not (folder / SETTINGS_FILE).is_file():
        return _Served(Blend(weights, dial=saved_dial(folder)), 0.0)
    settings = read_settings(folder)
    shift = 1.0 if settings.objective.parametrization == "absolute" else 0.0
    return _Served(Blend(weights, settings.alpha_0 + shift, settings.alpha_tilde, settings.dial), shift)


def _dtype(base: str, revision: str | None) -> str:
    """What the base's own config says its weights are; an unreadable one is for `load_base` to report."""
    try:
        dtype = load_config(base, revision=revision).dtype
    except QAdapterError:
        return "float32"
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else "float32"
