"""A language model as a scorer of texts: the frozen trunk under a LoRA adapter, and a scalar head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quartet.demo.conversion import quiet_transformers
from quartet.errors import CheckpointError
from quartet.models.attention import use_own_attention


class Scorer:
    """The language model's trunk under a LoRA adapter, with a scalar head; scores any position of a sequence."""

    def __init__(self, adapted: Any, pad: int) -> None:
        self.adapted = adapted
        classifier = adapted.get_base_model()
        self.trunk, self.head = classifier.base_model, classifier.score
        self.pad = pad
        self.precision = next(self.trunk.parameters()).dtype

    def trainable(self) -> list[nn.Parameter]:
        """Parameters of the adapter and the head."""
        return [parameter for parameter in self.adapted.parameters() if parameter.requires_grad]

    def hidden(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """`[rows, longest, width]` hidden states; right-padded, so a causal model needs no attention mask."""
        tokens = torch.full((len(rows), max(len(row) for row in rows)), self.pad)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == torch.bfloat16):
            states: Tensor = self.trunk(input_ids=tokens, use_cache=False).last_hidden_state
        return states

    def scores(self, hidden: Tensor, positions: Sequence[int]) -> Tensor:
        """`[rows]` float32 scores of the sequences up to and with the given positions."""
        at = hidden[torch.arange(len(positions)), torch.tensor(positions)]
        scores: Tensor = self.head(at.float())[:, 0]
        return scores


def new_scorer(model_dir: Path, *, lora_rank: int, lora_alpha: int, head_std: float) -> Scorer:
    """Load a causal language model as a scorer with a fresh adapter and head, drawn with torch's global generator.

    Args:
        model_dir: checkpoint folder.
        lora_rank: rank of the adapter on every linear layer but the head.
        lora_alpha: scale of the adapter times its rank.
        head_std: standard deviation that the head is drawn with.

    Raises:
        CheckpointError: the model has no pad token.
    """
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification

    # Frozen weights in the type of the computation: autocast has nothing to convert at each step.
    precision = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    with quiet_transformers():  # It would warn that the score head is new, which it is meant to be.
        model: Any = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=1, dtype=precision)
    use_own_attention(model)
    if model.config.pad_token_id is None:
        raise CheckpointError(f"{model_dir} names no pad token in its config.json; add pad_token_id there")
    model.config._name_or_path = str(model_dir.resolve())
    model.score = nn.Linear(model.config.hidden_size, 1, bias=False)
    nn.init.normal_(model.score.weight, std=head_std)
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=lora_rank, lora_alpha=lora_alpha, target_modules="all-linear")
    with quiet_transformers():
        adapted: Any = get_peft_model(model, lora)
    for module in adapted.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            # PEFT would convert activations to the adapter's float32, only for autocast to convert them back.
            module.cast_input_dtype_enabled = precision == torch.float32
    return Scorer(adapted, model.config.pad_token_id)
