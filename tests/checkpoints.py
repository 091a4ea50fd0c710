"""Tiny checkpoints of every supported family, written with transformers and PEFT alone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

FAMILIES = ("llama", "qwen2", "gpt2", "gpt_neox", "gemma2")
"""Qwen2, GPT-2 and Gemma2 tie their embeddings; GPT-2 and GPT-NeoX have dropout; Gemma2 has windows and soft-caps."""
FURTHER = ("gptj", "bloom", "mixtral", "opt")
"""Layers of GPT-J and Bloom return tuples; Mixtral has a router; OPT's forward calls the decoder inside its transformer."""
WIDE = "wide"
"""Llama with heads of 16 numbers, which the kernel of attention takes, and so whole layers can be one pass."""
TIED = ("qwen2", "gpt2", "gemma2")
HIDDEN, LAYERS, HEADS, MLP, POSITIONS = 32, 2, 4, 48, 64
SPECIAL = ("<pad>", "<eos>", "<stop>", "<|endoftext|>")
"""The last one because Qwen2's tokenizer class adds it where it is absent."""
VOCABULARY = 256 + len(SPECIAL)
PAD, EOS, STOP = 256, 257, 258
SPREAD = 0.3
"""Standard deviation of the weights: large enough that neither logits nor scores are all alike."""


def make_tokenizer(*, pad: str | None = "<pad>", extra: tuple[str, ...] = ()) -> Any:
    """Byte-level: one token a byte, then the special tokens."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([*SPECIAL, *extra])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token=pad)


def make_config(family: str, **changes: Any) -> Any:
    """The configuration of a family, two layers of 32 features."""
    import transformers as hf

    shared: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
    wide = {
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "initializer_range": SPREAD,
    }
    grouped = {"num_key_value_heads": 2}
    wide_heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    narrow = {
        "n_embd": HIDDEN,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_inner": MLP,
        "n_positions": POSITIONS,
        "initializer_range": SPREAD,
    }
    windows = {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0}
    makers: dict[str, Callable[..., Any]] = {
        "llama": lambda **c: hf.LlamaConfig(**{**shared, **wide, **grouped, **c}),
        "wide": lambda **c: hf.LlamaConfig(**{**shared, **wide, **wide_heads, **c}),
        "qwen2": lambda **c: hf.Qwen2Config(**{**shared, **wide, **grouped, "tie_word_embeddings": True, **c}),
        "gpt2": lambda **c: hf.GPT2Config(**{**shared, **narrow, **c}),
        "gpt_neox": lambda **c: hf.GPTNeoXConfig(
            **{**shared, **wide, "hidden_dropout": 0.1, "attention_dropout": 0.1, **c}
        ),
        "gemma2": lambda **c: hf.Gemma2Config(**{**shared, **wide, **grouped, **windows, **c}),
        "gptj": lambda **c: hf.GPTJConfig(**{**shared, **narrow, "rotary_dim": 4, **c}),
        "bloom": lambda **c: hf.BloomConfig(**{**shared, **narrow, **c}),
        "mixtral": lambda **c: hf.MixtralConfig(**{**shared, **wide, **grouped, "num_local_experts": 2, **c}),
        "opt": lambda **c: hf.OPTConfig(
            **{**shared, **wide, "word_embed_proj_dim": 16, "ffn_dim": MLP, "init_std": SPREAD, **c}
        ),
    }
    return makers[family](**changes)


def write_tokenizer(folder: Path) -> None:
    """The byte-level tokenizer."""
    make_tokenizer().save_pretrained(folder)


def write_model(folder: Path, family: str, *, task: str = "lm", seed: int = 0, **changes: Any) -> Path:
    """A full checkpoint with random weights; `task` is `lm` or `classifier`."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if task == "classifier":
        changes.setdefault("num_labels", 1)
    loader: Any = AutoModelForCausalLM if task == "lm" else AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = loader.from_config(make_config(family, **changes))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed + 1)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_adapter(
    folder: Path, base: Path, *, task: str = "lm", seed: int = 0, rank: int = 4, spread: float = 0.3, **changes: Any
) -> Path:
    """A LoRA adapter as PEFT writes it, none of whose matrices is zero; a classifier's head is saved along."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if task == "lm":
        model: Any = AutoModelForCausalLM.from_pretrained(base)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    options = {"target_modules": "all-linear", "lora_alpha": 3.0 * rank, **changes}
    config = LoraConfig(r=rank, task_type="CAUSAL_LM" if task == "lm" else "SEQ_CLS", **options)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
        warnings.simplefilter("ignore")  # PEFT corrects fan_in_fan_out for GPT-2 and says so
        model = get_peft_model(model, config)
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if ".lora_" in name or "modules_to_save" in name:
                parameter.normal_(0.0, spread)
        model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content.pop(key, None)
        if value is not None:
            content[key] = value
    path.write_text(json.dumps(content))


class Library:
    """Checkpoints by name, written when first asked for.

    `sft` and `reward` are full checkpoints of different weights; `sft-lora` and `reward-lora` are adapters over `sft`;
    `reward-on-reward` is an adapter over `reward`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.path = cache(self._path)

    def _path(self, family: str, name: str) -> Path:
        folder = self._folder / family / name
        if name == "sft":
            return write_model(folder, family, seed=1)
        if name == "reward":
            return write_model(folder, family, task="classifier", seed=2)
        if name == "sft-lora":
            return write_adapter(folder, self.path(family, "sft"), seed=3)
        if name == "reward-lora":
            return write_adapter(folder, self.path(family, "sft"), task="classifier", seed=4)
        assert name == "reward-on-reward"
        return write_adapter(folder, self.path(family, "reward"), task="classifier", seed=5)


def plain_model(folder: Path, *, task: str = "lm") -> nn.Module:
    """A checkpoint as transformers or PEFT alone load it, adapter or not, in evaluation mode."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config_file = folder / "adapter_config.json"
    base = json.loads(config_file.read_text())["base_model_name_or_path"] if config_file.is_file() else folder
    if task == "lm":
        model: Any = AutoModelForCausalLM.from_pretrained(base)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    if base != folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(model, folder)
    result: nn.Module = model.eval()
    return result
