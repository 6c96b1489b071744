"""The base model: a tokenizer and a small model from scratch, and the SFT base that preferences are customised from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from qadapter.config.model import FromScratch
from qadapter.config.training import PretrainingSettings
from qadapter.errors import QAdapterError
from qadapter.preferences.pair import Message
from qadapter.training.arguments import (
    measured_cost,
    save_weights,
    tokens_seen,
    train_to_end,
    trainer_arguments,
    write_training_record,
)

PAD, END, UNKNOWN = "<|pad|>", "<|end|>", "<|unk|>"
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

Conversation = Sequence[Message]


def train_tokenizer(conversations: Iterable[Conversation], size: FromScratch) -> PreTrainedTokenizerFast:
    """A tokenizer with a chat template, learnt from conversations.

    `words` splits at white space (for a closed language); `byte-bpe` can spell anything.
    """
    special = [PAD, END, UNKNOWN, *(f"<|{role}|>" for role in ROLES)]
    if size.tokenizer == "words":
        tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer: Any = trainers.WordLevelTrainer(vocab_size=size.vocab_size, special_tokens=special)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                # single digits: a small model can then copy and compare numbers
                pre_tokenizers.Split(Regex(r"\d"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size.vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    texts = (message["content"] for conversation in conversations for message in conversation)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=special[3:],
        padding_side="left",  # generation needs it; it persists only as a constructor argument
        model_max_length=size.context,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def model_from_scratch(size: FromScratch, tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """A randomly initialised Llama of the given size, embeddings tied."""
    set_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.hidden_size,
            intermediate_size=size.intermediate_size,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            max_position_embeddings=size.context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def pretrain(
    conversations: Sequence[Conversation],
    size: FromScratch,
    settings: PretrainingSettings,
    *,
    seed: int,
    out: Path,
    scratch: Path,
) -> None:
    """Train tokenizer and model from scratch on conversations, all tokens scored.

    Writes `model/` (weights as safetensors, config, tokenizer), `history.jsonl` and `metrics.json` to `out`.
    Resumes from the newest checkpoint in `scratch`.

    Raises:
        QAdapterError: there is no conversation.
    """
    if not conversations:
        raise QAdapterError("there is no conversation to pre-train on: every source is empty; add one that is not")
    tokenizer = train_tokenizer(conversations, size)
    model = model_from_scratch(size, tokenizer, seed)
    texts = tokenizer.apply_chat_template([list(each) for each in conversations], tokenize=False)  # type: ignore[arg-type]
    rows = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=settings.max_length)["input_ids"]
    arguments = trainer_arguments(settings, seed=seed, scratch=scratch)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=[{"input_ids": row} for row in rows],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    with measured_cost() as cost:
        train_to_end(trainer, "pre-training")
    save_weights(trainer, out / "model")
    tokenizer.save_pretrained(out / "model")
    tokens = tokens_seen([len(row) for row in rows], trainer.state.global_step, settings.batch_size)
    write_training_record(out, trainer, cost, tokens)
