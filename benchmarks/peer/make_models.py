"""Create the benchmarks' checkpoints, tokenizers and prompts, from random weights and this Python's own documentation.

usage: python benchmarks/peer/make_models.py --out FOLDER [S] [M] [--early]

Writes FOLDER/SIZE/policy, value and reward (full checkpoints with the tokenizer), reward-lora (an adapter over policy, for the
`single` plan) and prompts.jsonl (256 prompts of 16 to 48 tokens whose text tokenizes to their ids). With --early also
policy-early: the policy trained until it ends its response after 5 to 60 tokens, which the prompt decides.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sysconfig
from pathlib import Path
from typing import Any

import torch
from early import train_to_end
from peft import LoraConfig, get_peft_model
from probe import LORA_ALPHA, LORA_LINEARS, LORA_RANK
from sizes import SIZES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

DTYPES = {"0.5B": torch.bfloat16, "1.5B": torch.bfloat16}
"""Of the weights in the files; float32 where none is named."""
SEED = 1234
PROMPTS, SHORTEST, LONGEST = 256, 16, 48
CHECKPOINTS = ("policy", "value", "reward", "reward-lora")


def library_files() -> list[Path]:
    """Python's standard library, which is text that every machine has."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return sorted(p for p in library.rglob("*.py") if "site-packages" not in p.parts and "test" not in p.parts)


def docstrings() -> list[str]:
    """Its longer docstrings, each on one line."""
    found = set()
    for path in library_files():
        try:
            tree = ast.parse(path.read_text("utf8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 80:
                    found.add(" ".join(text.split()))
    return sorted(found)


def train_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the standard library's source."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(p) for p in library_files()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def make_prompts(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> list[dict[str, Any]]:
    """Beginnings of shuffled docstrings; only those whose text gives their ids back, so that both sides read the same."""
    rng = random.Random(SEED)
    order = documents[:]
    rng.shuffle(order)
    prompts: list[dict[str, Any]] = []
    for document in order:
        ids = tokenizer(document)["input_ids"][: rng.randint(SHORTEST, LONGEST)]
        text = tokenizer.decode(ids)
        if len(ids) >= SHORTEST and tokenizer(text)["input_ids"] == ids:
            prompts.append({"input_ids": ids, "text": text})
        if len(prompts) == PROMPTS:
            break
    return prompts


def make_checkpoints(root: Path, size: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Random weights of policy, value and reward, and a reward adapter over the policy's."""
    config = LlamaConfig(
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attention_dropout=0.0,
        **SIZES[size],
    )
    dtype = DTYPES.get(size, torch.float32)
    device = "cuda" if size in DTYPES and torch.cuda.is_available() else "cpu"  # billions of numbers are drawn
    with torch.device(device):
        torch.manual_seed(SEED)
        policy = AutoModelForCausalLM.from_config(config, dtype=dtype)
        policy.generation_config.pad_token_id = tokenizer.pad_token_id
        policy.save_pretrained(root / "policy")
        config.num_labels = 1
        for seed, name in enumerate(("value", "reward"), SEED + 1):
            torch.manual_seed(seed)
            AutoModelForSequenceClassification.from_config(config, dtype=dtype).save_pretrained(root / name)
    torch.manual_seed(SEED + 3)
    base = AutoModelForSequenceClassification.from_pretrained(root / "policy", num_labels=1)
    lora = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=LORA_LINEARS, task_type="SEQ_CLS")
    get_peft_model(base, lora).save_pretrained(root / "reward-lora")
    for name in CHECKPOINTS:
        tokenizer.save_pretrained(root / name)


def main() -> None:
    """Write what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["S", "M"], help=", ".join(SIZES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--early", action="store_true")
    options = parser.parse_args()
    for size in options.sizes:
        root: Path = options.out / size
        if not (root / "prompts.jsonl").exists():
            tokenizer = train_tokenizer(SIZES[size]["vocab_size"])
            tokenizer.save_pretrained(root / "tokenizer")
            lines = [json.dumps(prompt) + "\n" for prompt in make_prompts(tokenizer, docstrings())]
            (root / "prompts.jsonl").write_text("".join(lines))
        if not all((root / name / "tokenizer.json").exists() for name in CHECKPOINTS):
            make_checkpoints(root, size, PreTrainedTokenizerFast.from_pretrained(root / "tokenizer"))
        if options.early and not (root / "policy-early" / "config.json").exists():
            train_to_end(root)


if __name__ == "__main__":
    main()
