"""A base model and its Q-Adapters as one language model: `QAdapterForCausalLM`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from qadapter import policy_files
from qadapter.adapter_rows import BASE, AdapterRows
from qadapter.errors import QAdapterError
from qadapter.objective import BatchTotals, Objective, PairwiseLoss, pairwise_loss
from qadapter.pass_caches import PassCaches


@dataclass
class QAdapterOutput(CausalLMOutputWithPast):
    """What a forward pass returns.

    Attributes:
        loss: [] cross entropy if labels were given, the Q-Adapter loss if a response mask was.
        logits: [B, T, V] combined logits; absent if a response mask was given.
        past_key_values: the cache, if asked for.
        pairwise: the parts of the loss, if a response mask was given.
    """

    pairwise: PairwiseLoss | None = None


class QAdapterForCausalLM(PreTrainedModel, GenerationMixin):
    """A frozen base model, one or several Q-Adapters on it, and the policy that they make together.

    The logits are (Q + α0 · log π1)/α̃, where Q is a weighted sum over the adapters: Σ w_i · (adapted logits) with
    parametrisation `absolute`, Σ w_i · (adapted − base logits) with `residual`. Everything that works on logits works:
    `generate` in all its modes, lm-eval, perplexity.

    The dials between the old model and the new preference are `config.alpha_0` and `config.alpha_tilde`; both can be
    given to a single call of `forward` or `generate` too. They start at the values of the training.

    Only the adapters' dropout follows `train()`: the base's own dropout stays off, since log π1 is no sample.

    Attributes:
        peft_model: the base with its adapters.
        objective: what the adapters were (or are to be) trained with.
        adapter_weights: weight of each adapter in Q; see `set_adapter_weights`.
    """

    config_class = PretrainedConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self, peft_model: PeftModel, objective: Objective, adapter_weights: Mapping[str, float] | None = None
    ) -> None:
        """Wrap a PEFT model.

        Args:
            peft_model: base and adapters; `from_base` makes one.
            objective: its α0 and α̃ are where the dials start.
            adapter_weights: weight 1 for PEFT's active adapter without it.

        Raises:
            QAdapterError: a model that this method cannot work with; the message says why.
        """
        _refuse_unworkable(peft_model)
        base: Any = peft_model.get_base_model()
        config = copy.deepcopy(base.config)
        config.alpha_0, config.alpha_tilde = objective.alpha_0, objective.alpha_tilde
        super().__init__(config)
        self.peft_model = peft_model
        self.objective = objective
        self.generation_config = copy.deepcopy(base.generation_config)
        self._base_arguments = frozenset(inspect.signature(base.forward).parameters)
        self._no_split_modules = getattr(base, "_no_split_modules", None)
        self._parameter_count: int | None = None
        self._base_only = False
        self._rows = AdapterRows(peft_model)
        if self._rows.merged:
            raise QAdapterError(
                "An adapter is merged into the base's weights, so there is no base left to compare with. "
                "Call unmerge_adapter() on the PEFT model, or load the base anew."
            )
        self._adapter_weights: dict[str, float] = {}
        self.set_adapter_weights(adapter_weights or {peft_model.active_adapters[0]: 1.0})
        self.train(peft_model.training)

    @classmethod
    def from_base(cls, base: PreTrainedModel, peft_config: PeftConfig, objective: Objective) -> QAdapterForCausalLM:
        """Put a new, trainable adapter on a base model (which is changed in place: its layers are wrapped).

        Args:
            base: a causal language model without adapter.
            peft_config: a `LoraConfig`, say.
            objective: what the adapter is to be trained with.

        Raises:
            QAdapterError: as the constructor.
        """
        if isinstance(base, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in base.modules()):
            raise QAdapterError(
                "The base model carries an adapter already. Merge and unload it first (merge_and_unload()), "
                "or pass the PEFT model itself without another adapter config."
            )
        return cls(get_peft_model(base, peft_config), objective)

    # ---- files ----------------------------------------------------------------------------------------------------

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **_: Any,
    ) -> None:
        """Write a PEFT adapter folder (safetensors) that plain PEFT can load, and `q_adapter.json` beside it.

        Args:
            save_directory: made if absent.
            is_main_process: only that one writes.
            state_dict: this module's, where it had to be gathered from several processes.
        """
        policy_files.save(self, Path(save_directory), is_main_process=is_main_process, state_dict=state_dict)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        path: str | Path,
        base_model: str | Path | PreTrainedModel | None = None,
        *,
        is_trainable: bool = False,
        **base_options: Any,
    ) -> QAdapterForCausalLM:
        """Load what `save_pretrained` wrote, in eval mode.

        Args:
            path: the folder.
            base_model: the base or where it lies; the place named in the adapter's config without it.
            is_trainable: whether the adapter is to be trained on.
            base_options: for `AutoModelForCausalLM.from_pretrained` (`dtype`, `device_map`, `quantization_config` …).

        Raises:
            QAdapterError: no such folder, a file missing in it, or no base found.
        """
        peft_model, settings = policy_files.load(Path(path), base_model, is_trainable=is_trainable, **base_options)
        policy = cls(peft_model, settings.objective, settings.adapter_weights)
        policy.config.alpha_0, policy.config.alpha_tilde = settings.alpha_0, settings.alpha_tilde
        return policy.eval()

    # ---- several adapters -----------------------------------------------------------------------------------------

    @property
    def adapter_weights(self) -> dict[str, float]:
        """Weight of each adapter in Q, a copy; adapters of weight 0 are not computed."""
        return dict(self._adapter_weights)

    def set_adapter_weights(self, weights: Mapping[str, float]) -> None:
        """Say how much of each adapter's Q goes into the policy; adapters not named are switched off.

        With `residual`, every combination means something: Q_i is what preference i adds, zero weights give
        π1^(α0/α̃), which is the base at α0 = α̃. With `absolute` each Q_i is a full row of logits, so that the weights
        must sum to 1; `as_residual` turns such a policy into the same one in the other form.

        Raises:
            QAdapterError: an adapter that is not there, or weights that mean nothing in this parametrisation.
        """
        known = list(self.peft_model.peft_config)
        if unknown := [name for name in weights if name not in known]:
            raise QAdapterError(
                f"No adapter is named {', '.join(unknown)}; there are {', '.join(known)}. Attach it first."
            )
        complete = {name: float(weights.get(name, 0.0)) for name in known}
        active = [name for name, weight in complete.items() if weight]
        if self.objective.parametrization == "absolute" and abs(sum(complete.values()) - 1) > 1e-6:
            raise QAdapterError(
                f"The adapter weights sum to {sum(complete.values()):g}. With parametrisation 'absolute' each Q is a "
                "full row of logits, so that they must sum to 1. Rescale them, or call as_residual() first; "
                "disable_adapter() gives the base."
            )
        if len(active) > 1 and not self._rows.supported:
            raise QAdapterError(
                "Several adapters at once need plain LoRA layers (no DoRA or other variant, no other PEFT method). "
                "Use one adapter."
            )
        self._adapter_weights = complete

    def attach(self, path: str | Path, name: str, weight: float | None = None) -> None:
        """Load another trained Q-Adapter of the same base beside the ones that are there.

        Args:
            path: folder that `save_pretrained` wrote.
            name: what to call it.
            weight: its weight in Q from now on; not given, it is loaded and switched off.

        Raises:
            QAdapterError: the name is taken, the folder is no Q-Adapter, or it was trained in the other
                parametrisation.
        """
        if name in self.peft_model.peft_config:
            raise QAdapterError(f"An adapter named {name!r} is there already. Choose another name.")
        settings = policy_files.read_settings(Path(path))
        mine, other = self.objective.parametrization, settings.objective.parametrization
        if mine != other:
            raise QAdapterError(
                f"The adapter in {path} has parametrisation {other!r}, this policy {mine!r}: their Q do not add up. "
                "Turn the absolute one into the residual form with as_residual() and save it again."
            )
        self.peft_model.load_adapter(str(path), adapter_name=name, is_trainable=False)
        self._rows = AdapterRows(self.peft_model)
        self.train(self.training)
        self.set_adapter_weights({**self._adapter_weights, name: weight or 0.0})

    def as_residual(self) -> None:
        """Turn an `absolute` policy into the `residual` form of the same policy: Q − log π1, with α0 + 1.

        Adapters of the residual form can be composed with any weights. The adapters themselves do not change.
        """
        if self.objective.parametrization == "residual":
            return
        self.objective = replace(self.objective, parametrization="residual", alpha_0=self.objective.alpha_0 + 1)
        self.config.alpha_0 += 1

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block this model is the base: its logits are the base's, whatever the dials say."""
        before = self._base_only
        self._base_only = True
        try:
            yield
        finally:
            self._base_only = before

    # ---- passes ---------------------------------------------------------------------------------------------------

    def q_and_base_logits(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Both rows for training: the adapted model's logits with autograd, the base's without.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T].
            options: further arguments of the base's `forward`.

        Returns:
            Two [B, T, V]; with `residual` it is up to the objective to subtract the second from the first.
        """
        self.trained_adapter()
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False, **options}
        with torch.no_grad(), self._bare(len(input_ids)):
            base_logits = self.peft_model(**inputs).logits
        return self.peft_model(**inputs).logits, base_logits

    def trained_adapter(self) -> str:
        """Name of the one adapter that training moves.

        Raises:
            QAdapterError: several have a weight, or the one that has is not PEFT's active one or has not weight 1.
        """
        active = {name: weight for name, weight in self._adapter_weights.items() if weight}
        if active != dict.fromkeys(self.peft_model.active_adapters, 1.0) or len(active) != 1:
            raise QAdapterError(
                f"Training moves one adapter, with weight 1; the weights are {self._adapter_weights}, and PEFT's "
                f"active adapter is {', '.join(self.peft_model.active_adapters)}. Set both to the one to train."
            )
        return next(iter(active))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        alpha_0: float | None = None,
        alpha_tilde: float | None = None,
        response_mask: Tensor | None = None,
        totals: BatchTotals | None = None,
        **options: Any,
    ) -> QAdapterOutput:
        """Combined logits of the policy; or, given a response mask, the training loss of pairs.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T].
            position_ids: [B, T].
            past_key_values: cache of this policy (it holds a row for the base and one for each adapter).
            inputs_embeds: [B, T, H] in place of `input_ids`.
            labels: [B, T] int64, -100 where there is none: also return the cross entropy of the next tokens.
            use_cache: return a cache. Off unless asked for or given one.
            logits_to_keep: only the logits of the last so many positions (0: all).
            alpha_0: α0 of this call.
            alpha_tilde: α̃ of this call.
            response_mask: [2B, T] bool: the rows are pairs, compute `objective`'s loss and no combined logits.
            totals: with a response mask, what the loss divides by.
            options: further arguments of the base's `forward`.
        """
        if response_mask is not None:
            assert input_ids is not None
            q_logits, base_logits = self.q_and_base_logits(input_ids, attention_mask, **options)
            pairwise = pairwise_loss(q_logits, base_logits, input_ids, response_mask, self.objective, totals)
            return QAdapterOutput(loss=pairwise.loss, pairwise=pairwise)

        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "logits_to_keep": logits_to_keep,
            **options,
        }
        inputs = {name: value for name, value in inputs.items() if value is not None and self._base_takes(name)}
        use_cache = bool(use_cache) or past_key_values is not None
        groups, cache = self._row_logits(inputs, past_key_values, use_cache)
        logits = self._combine(groups, alpha_0, alpha_tilde)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        return QAdapterOutput(loss=loss, logits=logits, past_key_values=cache)

    def _base_takes(self, name: str) -> bool:
        return name not in ("position_ids", "logits_to_keep", "inputs_embeds") or name in self._base_arguments

    def _groups(self) -> list[str]:
        """Names of the groups of rows a pass computes; the base comes last."""
        active = [] if self._base_only else [name for name, weight in self._adapter_weights.items() if weight]
        return [*active, BASE]

    def _row_logits(
        self, inputs: dict[str, Any], cache: Cache | None, use_cache: bool
    ) -> tuple[list[Tensor], Cache | None]:
        """Logits of each group of rows, and the cache that holds them all."""
        names = self._groups()
        # With autograd one pass would keep the activations of the base's rows as well, and recomputing them for
        # gradient checkpointing would happen after the rows' names are gone.
        if self._rows.supported and not torch.is_grad_enabled():
            rows = len(next(inputs[name] for name in ("input_ids", "inputs_embeds") if name in inputs))
            with self._rows.use([name for name in names for _ in range(rows)]):
                output = self.peft_model(
                    **{name: _repeat_rows(value, len(names), rows) for name, value in inputs.items()},
                    past_key_values=cache,
                    use_cache=use_cache,
                )
            return list(output.logits.chunk(len(names))), output.past_key_values if use_cache else None

        caches = PassCaches.around(cache, len(names)) if use_cache else None
        logits = []
        for group, name in enumerate(names):
            options = {**inputs, "past_key_values": caches.part(group) if caches else None, "use_cache": use_cache}
            if name == BASE:
                with torch.no_grad(), self._bare(len(next(iter(inputs.values())))):
                    output = self.peft_model(**options)
            else:
                with self._through(name, len(next(iter(inputs.values())))):
                    output = self.peft_model(**options)
            if caches:
                caches.put(group, output.past_key_values)
            logits.append(output.logits)
        return logits, caches

    def _combine(self, groups: Sequence[Tensor], alpha_0: float | None, alpha_tilde: float | None) -> Tensor:
        *adapted, base = [logits if logits.dtype == torch.float64 else logits.float() for logits in groups]
        if self._base_only:
            return base
        alpha_0 = self.config.alpha_0 if alpha_0 is None else alpha_0
        alpha_tilde = self.config.alpha_tilde if alpha_tilde is None else alpha_tilde
        if not alpha_tilde > 0 or not alpha_0 >= 0:
            raise QAdapterError(
                f"alpha_0 is {alpha_0} and alpha_tilde {alpha_tilde}; expected at least 0 and above 0. "
                "Set both in policy.config or in the call."
            )
        weights = [weight for weight in self._adapter_weights.values() if weight]
        # α0 · log π1 − Σ w_i · base if Q_i is a difference; the normaliser of π1 is a constant of each position
        of_base = alpha_0 - (sum(weights) if self.objective.parametrization == "residual" else 0.0)
        logits = of_base * base - alpha_0 * base.logsumexp(dim=-1, keepdim=True)
        for weight, row in zip(weights, adapted, strict=True):
            logits = logits + weight * row
        return logits / alpha_tilde

    @contextmanager
    def _bare(self, rows: int) -> Iterator[None]:
        """Every row through the base alone."""
        if self._rows.supported:
            with self._rows.use([BASE] * rows):
                yield
            return
        # PEFT switches the adapters' parameters to trainable when it enables them again
        trainable = [(parameter, parameter.requires_grad) for parameter in self.peft_model.parameters()]
        with self.peft_model.disable_adapter():
            yield
        for parameter, required in trainable:
            parameter.requires_grad_(required)

    @contextmanager
    def _through(self, name: str, rows: int) -> Iterator[None]:
        """Every row through this adapter."""
        if self.peft_model.active_adapters == [name]:
            yield
        elif self._rows.supported:
            with self._rows.use([name] * rows):
                yield
        else:
            raise QAdapterError(
                f"Adapter {name} is not PEFT's active one, and these adapter layers cannot choose by row. "
                f"Call peft_model.set_adapter({name!r}) first."
            )

    # ---- what transformers asks of a model ------------------------------------------------------------------------

    def _reorder_cache(self, past_key_values: Cache, beam_idx: Tensor) -> Cache:
        """Beam search's hook: sequence i continues `beam_idx[i]`, in each group of rows."""
        if isinstance(past_key_values, PassCaches):
            past_key_values.reorder_cache(beam_idx)  # type: ignore[arg-type]
        else:
            groups = range(len(self._groups()))
            rows = torch.cat([beam_idx + group * len(beam_idx) for group in groups])
            past_key_values.reorder_cache(rows)  # type: ignore[arg-type]
        return past_key_values

    def train(self, mode: bool = True) -> QAdapterForCausalLM:
        """Train or eval mode of the adapters; the base's own dropout stays off in both."""
        super().train(False)
        self.training = mode
        for module in self.peft_model.modules():
            if isinstance(module, BaseTunerLayer):
                assert isinstance(module, nn.Module)
                for name, child in module.named_children():
                    if name != "base_layer":
                        child.train(mode)
            elif isinstance(module, GradientCheckpointingLayer):
                module.training = mode  # of this module alone: it decides whether to recompute, nothing else
        return self

    def floating_point_ops(self, input_dict: dict[str, Any], exclude_embeddings: bool = True) -> int:
        """Trainer's estimate of a step's operations; the parameters are counted once, not at every step."""
        if self._parameter_count is None:
            self._parameter_count = self.num_parameters(exclude_embeddings=exclude_embeddings)
        return 6 * self.estimate_tokens(input_dict) * self._parameter_count

    def get_input_embeddings(self) -> nn.Module:
        """The base's."""
        base: Any = self.peft_model.get_base_model()
        return base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The base's."""
        base: Any = self.peft_model.get_base_model()
        return base.get_output_embeddings()


def _repeat_rows(value: Any, times: int, rows: int) -> Any:
    """Tensors of `rows` rows `times` times over; anything else as it is."""
    if isinstance(value, dict):
        return {name: _repeat_rows(part, times, rows) for name, part in value.items()}
    if isinstance(value, Tensor) and value.ndim > 1 and len(value) == rows:
        return value.repeat(times, *[1] * (value.ndim - 1))
    return value


def _refuse_unworkable(peft_model: PeftModel) -> None:
    if not isinstance(peft_model, PeftModel):
        raise QAdapterError(
            f"{type(peft_model).__name__} carries no adapter. Give a PEFT model, or a base model together with an "
            "adapter config (QAdapterForCausalLM.from_base, or peft_config of the trainer)."
        )
    for name, config in peft_model.peft_config.items():
        if config.is_prompt_learning:
            raise QAdapterError(
                f"Adapter {name} learns a prompt ({config.peft_type}), which moves every position. "
                "Use one that changes layers, such as LoRA."
            )
    base: Any = peft_model.get_base_model()
    if base.config.is_encoder_decoder:
        raise QAdapterError(f"{type(base).__name__} is an encoder-decoder model; expected a causal language model.")
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    adapted = any(isinstance(end, BaseTunerLayer) or hasattr(end, "modules_to_save") for end in ends)
    if base.config.get_text_config().tie_word_embeddings and adapted:
        raise QAdapterError(
            "The base ties its input and output embeddings and the adapter changes one of them, so that base and "
            "adapted model cannot be told apart. Leave embeddings and head out of target_modules and modules_to_save."
        )
