"""A base model and its Q-Adapters as one language model: `QAdapterForCausalLM`."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from qadapter.errors import QAdapterError
from qadapter.policy import files as policy_files
from qadapter.policy.adapter_rows import BASE
from qadapter.policy.adapters import adapted
from qadapter.policy.caches import note_states, refuse_states_of_others
from qadapter.policy.composition import ComposedAdapters, refuse_unworkable
from qadapter.policy.dial import AS_TRAINED, Dial, combined
from qadapter.policy.frozen import SilencedLayers
from qadapter.policy.fused import loss_from_scored
from qadapter.policy.objective import BatchTotals, Objective, PairwiseLoss, pairwise_loss
from qadapter.policy.pair_passes import PairPasses
from qadapter.policy.passes import RowPasses, refuse_outputs, reorder_rows
from qadapter.policy.probe import can_be_probed, logits_of, probe_ids, refuse_other_base
from qadapter.policy.ranges import check_dials
from qadapter.policy.scaling import AdapterScale

log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class _Parts:
    """What a policy's logits are made of.

    Attributes:
        names: rows to compute: adapters, and `BASE` last.
        weights: coefficient of each; one more where the base is not computed.
        normalizer: coefficient of the base's normaliser; 0 where it is left out.
        scale: factor on what the adapters add to the layers.
    """

    names: list[str]
    weights: list[float]
    normalizer: float
    scale: float


class QAdapterForCausalLM(ComposedAdapters, PreTrainedModel, GenerationMixin):
    """A frozen base model, one or several Q-Adapters on it, and the policy that they make together.

    The logits are (Q + α0 · log π1)/α̃, where Q is a weighted sum over the adapters: Σ w_i · (adapted logits) with
    parametrisation `absolute`, Σ w_i · (adapted − base logits) with `residual`. Everything that works on logits works:
    `generate` in all its modes, lm-eval, perplexity.

    The dial between the old model and the new preference is `dial`: 0 is the base exactly, 1 the policy as trained. The
    objective's own α0 and α̃ are `config.alpha_0` and `config.alpha_tilde` and start at the values of the training. All
    three can be given to a single call of `forward` or `generate` too.

    Only the adapters' dropout follows `train()`: the base's own dropout stays off, since log π1 is no sample.

    Attributes:
        peft_model: the base with its adapters.
        objective: what the adapters were (or are to be) trained with.
        adapter_weights: weight of each adapter in Q; see `set_adapter_weights`.
        dial: where the dial stands; `save_pretrained` keeps it.
        plain: whether it was made from an adapter that knows no Q-Adapter (SFT, DPO …): the residual form with
            α0 = α̃ = 1 says the same, and its logits are then given up to a constant, which spares the base's pass.
        loss_implementation: how `forward` computes the loss of pairs: `fused` (`qadapter/policy/fused.py`) where the
            model's head allows it, or `readable` (`objective.py` beside it).
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
        refuse_unworkable(peft_model)
        check_dials(objective.alpha_0, objective.alpha_tilde)
        base: Any = peft_model.get_base_model()
        config = copy.deepcopy(base.config)
        config.alpha_0, config.alpha_tilde = objective.alpha_0, objective.alpha_tilde
        super().__init__(config)
        self.peft_model = peft_model
        self.objective = objective
        self.generation_config = copy.deepcopy(base.generation_config)
        self._base_arguments = frozenset(inspect.signature(base.forward).parameters)
        self._no_split_modules = getattr(base, "_no_split_modules", None)
        self._is_stateful = base._is_stateful
        self._silenced = SilencedLayers()
        self._parameter_count: int | None = None
        self._base_only = False
        self._passes, self._scale = RowPasses(peft_model), AdapterScale(peft_model)
        self._pair_passes: PairPasses | None = None
        self._dial = AS_TRAINED
        self.plain = False
        self.loss_implementation: Literal["readable", "fused"] = "fused"
        self._adapter_weights = {}
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
        expected = logits_of(base, probe_ids(base)) if can_be_probed(base) else None
        policy = cls(adapted(base, peft_config), objective)
        refuse_other_base(policy, expected)
        return policy

    @classmethod
    def around(cls, peft_model: PeftModel, dial: Dial | str | None = None) -> QAdapterForCausalLM:
        """A plain PEFT adapter (SFT, DPO, replay, one from elsewhere) as a policy with a dial.

        Args:
            peft_model: base and adapter.
            dial: where it stands; as trained without it.

        Raises:
            QAdapterError: as the constructor.
        """
        policy = cls(peft_model, Objective.preset("residual"))
        policy.plain, policy.dial = True, dial
        return policy

    @property
    def dial(self) -> Dial:
        """Where the dial stands. It can be set to a `Dial`, to its text (`scale=0.5`), or to None: as trained."""
        return self._dial

    @dial.setter
    def dial(self, dial: Dial | str | Mapping[str, Any] | None) -> None:
        self._dial = Dial.of(dial) or AS_TRAINED

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

        For a plain adapter alone it is `dial.json`, and only if the dial was moved. What another kind of policy left in
        the folder to say what it is goes.

        Args:
            save_directory: made if absent.
            is_main_process: only that one writes.
            state_dict: this module's, where it had to be gathered from several processes.
        """
        alphas = (self.config.alpha_0, self.config.alpha_tilde)
        plain = self.plain and list(self.adapter_weights.values()) == [1.0] and alphas == (1.0, 1.0)
        settings = policy_files.PolicySettings(self.objective, *alphas, self.adapter_weights, self.dial, plain)
        policy_files.save(
            self.peft_model, settings, Path(save_directory), is_main_process=is_main_process, state_dict=state_dict
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        path: str | Path,
        base_model: str | Path | PreTrainedModel | None = None,
        *,
        is_trainable: bool = False,
        allow_base_mismatch: bool = False,
        **base_options: Any,
    ) -> QAdapterForCausalLM:
        """Load what `save_pretrained` wrote, or any plain PEFT adapter, in eval mode.

        Args:
            path: the folder.
            base_model: the base or where it lies; the place named in the adapter's config without it.
            is_trainable: whether the adapter is to be trained on.
            allow_base_mismatch: whether the base may be another one than the adapter was trained on.
            base_options: for `AutoModelForCausalLM.from_pretrained` (`dtype`, `device_map`, `quantization_config` …).

        Raises:
            QAdapterError: no such folder, a file missing in it, no base found, or another one than the adapter was
                trained on.
        """
        peft_model, settings, expected = policy_files.load(
            Path(path),
            base_model,
            is_trainable=is_trainable,
            allow_base_mismatch=allow_base_mismatch,
            **base_options,
        )
        policy = cls(peft_model, settings.objective, settings.adapter_weights)
        refuse_other_base(policy, expected)
        policy.config.alpha_0, policy.config.alpha_tilde = settings.alpha_0, settings.alpha_tilde
        policy.plain = settings.plain
        if not is_trainable:  # training moves the policy as it was trained, and a new dial is chosen afterwards
            policy.dial = settings.dial
        return policy.eval()

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
        inputs = {name: value for name, value in inputs.items() if self._base_takes(name)}
        with self._passes.bare(len(input_ids)):
            base_logits = self.peft_model(**inputs).logits
        return self.peft_model(**inputs).logits, base_logits

    def combined_hidden(self, input_ids: Tensor, attention_mask: Tensor, decoder: Any) -> Tensor:
        """Hidden states [B, T, H] whose product with a linear head is this policy's logits, up to a constant.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T].
            decoder: the base's body.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        parts = self._parts(self.config.alpha_0, self.config.alpha_tilde, self.dial, up_to_constant=True)
        hidden = []
        with self._scale.at(parts.scale):
            for name in parts.names:
                with self._passes.bare(len(input_ids)) if name == BASE else self._passes.through(name, len(input_ids)):
                    hidden.append(decoder(**inputs)[0])
        return _weighted_sum(hidden, parts.weights)

    def _parts(self, alpha_0: float, alpha_tilde: float, dial: Dial, up_to_constant: bool) -> _Parts:
        """What the logits are a sum of. The base is there where its weight or its normaliser matters."""
        if self._base_only or not dial.value:
            return _Parts([BASE], [1.0], 0.0, 1.0)
        active = {name: weight for name, weight in self._adapter_weights.items() if weight}
        residual = self.objective.parametrization == "residual"
        sums = combined(active, alpha_0, alpha_tilde, residual=residual, dial=dial)
        base_matters = not active or sums.base != 0 or (sums.normalizer != 0 and not up_to_constant)
        return _Parts(
            [*active, *([BASE] if base_matters else [])],
            [*sums.adapters.values(), sums.base],
            0.0 if up_to_constant else sums.normalizer,
            dial.value if dial.kind == "scale" and active else 1.0,
        )

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
        dial: Dial | str | None = None,
        totals: BatchTotals | None = None,
        up_to_constant: bool | None = None,
        **options: Any,
    ) -> QAdapterOutput:
        """Combined logits of the policy; or, given a response mask, the training loss of pairs.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T].
            position_ids: [B, T].
            past_key_values: cache of this policy (it holds a row for the base and one for each adapter), filled at the
                same scale of the dial.
            inputs_embeds: [B, T, H] in place of `input_ids`.
            labels: [B, T] int64, -100 where there is none: also return the cross entropy of the next tokens.
            use_cache: return a cache. Off unless asked for or given one.
            logits_to_keep: only the logits of the last so many positions (0: all).
            alpha_0: α0 of this call.
            alpha_tilde: α̃ of this call.
            response_mask: [2B, T] bool: the rows are pairs, compute `objective`'s loss and no combined logits.
            dial: the dial of this call: a `Dial`, or its text such as `scale=0.5`. Losses of pairs are of the policy as
                trained.
            totals: with a response mask, what the loss divides by.
            up_to_constant: leave out what is the same for all tokens at a position, which no probability depends on.
                With `residual` and α0 = Σ w_i that is everything the base contributes: its pass is spared. Without it
                only for a plain adapter.
            options: further arguments of the base's `forward`, and of the loss with labels (`num_items_in_batch`).

        Raises:
            QAdapterError: dials out of range, a cache of other adapters, or hidden states, attentions or a tuple are
                asked for.
        """
        refuse_outputs(options)
        if response_mask is not None:
            assert input_ids is not None
            pairwise = self._pair_loss(input_ids, attention_mask, response_mask, totals, options)
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
        alpha_0 = self.config.alpha_0 if alpha_0 is None else alpha_0
        alpha_tilde = self.config.alpha_tilde if alpha_tilde is None else alpha_tilde
        check_dials(alpha_0, alpha_tilde)
        stands = self.dial if dial is None else Dial.of(dial)
        assert stands is not None
        parts = self._parts(alpha_0, alpha_tilde, stands, self.plain if up_to_constant is None else up_to_constant)
        refuse_states_of_others(past_key_values, parts.names, parts.scale)
        with self._scale.at(parts.scale):
            rows, cache = self._passes.logits(parts.names, inputs, past_key_values, use_cache)
        if cache is not None:
            note_states(cache, parts.names, parts.scale)
        rows = [row if row.dtype == torch.float64 else row.float() for row in rows]
        normalizer = _log_normalizer(rows[-1]) if parts.normalizer else None
        logits = _weighted_sum(rows, parts.weights)
        if normalizer is not None:
            logits = _weighted_sum([logits, normalizer], [1.0, -parts.normalizer])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **options)
        return QAdapterOutput(loss=loss, logits=logits, past_key_values=cache)

    def _pair_loss(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        response_mask: Tensor,
        totals: BatchTotals | None,
        options: dict[str, Any],
    ) -> PairwiseLoss:
        if self.loss_implementation == "fused" and not options:
            self.trained_adapter()
            if self._pair_passes is None:
                self._pair_passes = PairPasses(self.peft_model, self._passes)
            passes = self._pair_passes
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            passes.check(input_ids, mask)
            if passes.usable:
                hidden, base_hidden = passes.hidden(input_ids, mask, response_mask, self.objective.shift_mask)
                tokens = (input_ids, response_mask, self.objective, totals)
                return loss_from_scored(hidden, base_hidden, passes.head(), *tokens)
            log.warning("The fused loss does not fit this model's head or adapter; the readable one is used.")
            self.loss_implementation = "readable"
        q_logits, base_logits = self.q_and_base_logits(input_ids, attention_mask, **options)
        return pairwise_loss(q_logits, base_logits, input_ids, response_mask, self.objective, totals)

    def _base_takes(self, name: str) -> bool:
        optional = ("attention_mask", "use_cache", "position_ids", "logits_to_keep", "inputs_embeds")
        return name not in optional or name in self._base_arguments

    # ---- what transformers asks of a model ------------------------------------------------------------------------

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Whether the kernel for experts can be chosen is the base's affair, and was when it was made."""
        return True

    def _supports_default_dynamic_cache(self) -> bool:  # type: ignore[override]
        return self._passes.cache_name is not None

    def generate(
        self,
        *args: Any,
        dial: Dial | str | None = None,
        alpha_0: float | None = None,
        alpha_tilde: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """GenerationMixin's; a base whose cache is none of transformers' reads the whole sequence for each token.

        Args:
            args, kwargs: of GenerationMixin.
            dial, alpha_0, alpha_tilde: for this text. They are set for as long as it takes: some ways of decoding call
                the policy without the arguments of the call (classifier-free guidance), or pass them on to another
                model (assisted decoding).
        """
        if self._passes.cache_name is None:
            kwargs["use_cache"] = False
        before = self.dial, self.config.alpha_0, self.config.alpha_tilde
        self.dial = Dial.of(dial) or self.dial
        self.config.alpha_0 = self.config.alpha_0 if alpha_0 is None else alpha_0
        self.config.alpha_tilde = self.config.alpha_tilde if alpha_tilde is None else alpha_tilde
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.dial, self.config.alpha_0, self.config.alpha_tilde = before

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The base's own, with `up_to_constant`, since sampling depends on differences of logits only.

        Architectures do things of their own here: a rope that changes with length starts its cache anew (Phi-3), a
        state-space model takes no mask after the first step.
        """
        base: Any = self.peft_model.get_base_model()
        inputs = base.prepare_inputs_for_generation(input_ids, **kwargs)
        if self._passes.cache_name == "cache_params":
            inputs["past_key_values"] = inputs.pop("cache_params", None)
        return {**inputs, "use_cache": kwargs.get("use_cache"), "up_to_constant": True}

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *arguments: Any, **options: Any
    ) -> Any:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *arguments, **options)  # type: ignore[misc]
        self._rename_cache(model_kwargs)

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *arguments: Any, **options: Any
    ) -> dict[str, Any]:
        updated: dict[str, Any] = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *arguments, **options
        )
        self._rename_cache(updated)
        return updated

    def _rename_cache(self, model_kwargs: dict[str, Any]) -> None:
        """Let `generate` know the cache by the base's name for it: what it does with one depends on the name."""
        name = self._passes.cache_name
        if name == "cache_params" and "past_key_values" in model_kwargs:
            model_kwargs[name] = model_kwargs.pop("past_key_values")

    def _reorder_cache(self, past_key_values: Cache, beam_idx: Tensor) -> Cache:
        """Beam search's hook: sequence i continues `beam_idx[i]`, in each group of rows."""
        reorder_rows(past_key_values, beam_idx)
        return past_key_values

    def train(self, mode: bool = True) -> QAdapterForCausalLM:
        """Train or eval mode of the adapters; the base's own dropout stays off in both."""
        super().train(False)
        self.training = mode
        self._silenced.train(self.peft_model, mode)
        trainable = any(parameter.requires_grad for parameter in self.peft_model.parameters())
        for module in self.peft_model.modules():
            if isinstance(module, BaseTunerLayer):
                assert isinstance(module, nn.Module)
                for name, child in module.named_children():
                    if name != "base_layer":
                        child.train(mode)
            elif type(module).__module__.startswith("bitsandbytes"):
                # In eval mode, a 4-bit layer on CPU repacks its weights for a kernel without autograd, for good
                module.train(mode or trainable)
        return self

    def floating_point_ops(self, input_dict: dict[str, Any], exclude_embeddings: bool = True) -> int:
        """Trainer's estimate of a step's operations; the parameters are counted once, not at every step."""
        if self._parameter_count is None:
            self._parameter_count = self.num_parameters(exclude_embeddings=exclude_embeddings)
        return 6 * input_dict["input_ids"].numel() * self._parameter_count

    def get_input_embeddings(self) -> nn.Module:
        """The base's."""
        base: Any = self.peft_model.get_base_model()
        return base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The base's."""
        base: Any = self.peft_model.get_base_model()
        return base.get_output_embeddings()


def _weighted_sum(rows: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ weight · row. Rows without autograd are overwritten: nothing else holds them, and nothing is as large."""
    first, *others = zip(rows, weights, strict=False)
    total = first[0] * first[1] if first[0].requires_grad else first[0].mul_(first[1])
    for row, weight in others:
        total = torch.add(total, row, alpha=weight) if total.requires_grad else total.add_(row, alpha=weight)
    return total


def _log_normalizer(logits: Tensor) -> Tensor:
    """logsumexp over the vocabulary, [B, T, 1]; row by row, since torch's own makes a copy of what it is given."""
    return torch.stack([row.logsumexp(dim=-1, keepdim=True) for row in logits])
