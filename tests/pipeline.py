"""One PPO iteration taken apart, so that tests can look between the stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quartet.config import Config, parse_config
from quartet.models.backbone import Backbone
from quartet.models.layout import Layout
from quartet.models.roles import Roles
from quartet.records import Advantaged, Prompts, Rollout, Scored, Sequences, UpdateStats
from quartet.run.setup import load_everything, read_inputs, score_with
from quartet.stages.advantages import compute_advantages
from quartet.stages.batching import SequenceTable
from quartet.stages.optimizer import set_learning_rate
from quartet.stages.update import Updater


class Pipeline:
    """A loaded configuration and its stages."""

    def __init__(self, values: dict[str, Any] | Config) -> None:
        self.config = values if isinstance(values, Config) else parse_config(values)
        self.notices: list[str] = []
        self.inputs = read_inputs(self.config, self.notices.append)
        self.loaded = load_everything(self.config, self.inputs, self.notices.append)
        self.iteration = 0

    @property
    def roles(self) -> Roles:
        return self.loaded.roles

    def rollout(self, prompts: Prompts | None = None) -> Rollout:
        if prompts is None:
            size = self.config.rollout.batch_size
            prompts = self.inputs.prompts.batch(self.iteration * size, size, self.config.run.seed)
        return self.loaded.rollout.generate(prompts)

    def score(self, rollout: Rollout) -> Scored:
        return score_with(self.config, (), self.loaded, rollout)

    def advantages(self, scored: Scored) -> Advantaged:
        return compute_advantages(scored, self.config.ppo, kl_coef=self.config.ppo.kl_coef)

    def updater(self, *, at_once: bool = False) -> Updater:
        loaded, config = self.loaded, self.config
        return Updater(
            loaded.trained,
            loaded.optimizer,
            loaded.engine,
            config.ppo,
            temperature=config.rollout.temperature,
            seed=config.run.seed,
            at_once=at_once,
            say=self.notices.append,
        )

    def update(self, batch: Advantaged) -> UpdateStats:
        set_learning_rate(self.loaded.optimizer, self.config.ppo, self.iteration)
        self.iteration += 1
        return self.updater().update(batch, iteration=self.iteration)

    def iterate(self) -> tuple[Advantaged, UpdateStats]:
        """One whole iteration."""
        batch = self.advantages(self.score(self.rollout()))
        return batch, self.update(batch)

    def trained(self) -> dict[str, Tensor]:
        """Copies of all trained weights, by role and name."""
        return {
            f"{role}:{name}": parameter.detach().clone()
            for role in ("policy", "value")
            for name, parameter in self.roles.trained_parameters(role)  # type: ignore[arg-type]
        }

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of all trained weights, by role and name; zeros where there is none."""
        return {
            f"{role}:{name}": torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            for role in ("policy", "value")
            for name, parameter in self.roles.trained_parameters(role)  # type: ignore[arg-type]
        }


def hidden_of(backbone: Backbone, ids: Tensor, adapter: str | None) -> Tensor:
    """Last hidden states of rows of tokens `[n, L]` without padding."""
    lengths = torch.full((len(ids),), ids.shape[1])
    layout = Layout.padded(Sequences(ids, lengths, torch.zeros_like(lengths)))
    return backbone.hidden(layout, adapter).view(*ids.shape, -1)


def sequences(prompts: list[list[int]], responses: list[list[int]]) -> tuple[Sequences, Tensor]:
    """Right-padded sequences and their response mask `[n, longest response]`."""
    rollout = rollout_of(prompts, responses)
    table = SequenceTable.of(rollout)
    return table.rows(list(range(len(prompts))))[1], rollout.response_mask


def rollout_of(prompts: list[list[int]], responses: list[list[int]], *, width: int | None = None) -> Rollout:
    """A rollout that says that these responses were sampled, with log-probability 0."""
    width = width or max(map(len, responses))
    mask = torch.tensor([[step < len(r) for step in range(width)] for r in responses])
    tokens = torch.tensor([r + [0] * (width - len(r)) for r in responses])
    texts = tuple(f"prompt {row}" for row in range(len(prompts)))
    return Rollout(
        prompts=Prompts(tuple(range(len(prompts))), texts, tuple(torch.tensor(p) for p in prompts)),
        tokens=tokens,
        response_mask=mask,
        logprobs=torch.zeros(mask.shape),
        stopped=torch.zeros(len(prompts), dtype=torch.bool),
        decode_steps=0,
    )
