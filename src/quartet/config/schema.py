"""The configuration's fields. Every field has a docstring here and a reader elsewhere (a test checks both)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from quartet.config.ppo import PPOConfig
from quartet.config.rollout import RolloutConfig
from quartet.config.values import (
    Finite,
    NonNegativeInt,
    Place,
    Positive,
    PositiveInt,
    RightGradients,
    Seconds,
    Section,
)
from quartet.errors import shown


class LoraConfig(Section):
    """LoRA adapters of the trained roles."""

    r: PositiveInt = 16
    """Rank of the adapters."""
    alpha: Positive = 32.0
    """Scale: the adapter's output is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0.0, le=0.0)] = 0.0
    """Always 0: dropout would make the log-probabilities of the update differ from those of the rollout."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Module names to adapt, or `all-linear` for every linear layer except the heads. A name that no layer has is refused."""


class ModelsConfig(Section):
    """The two checkpoints and how the four roles share them."""

    sft: Place
    """SFT checkpoint of policy and reference: folder or Hub id of a causal language model, or of a LoRA adapter on one."""
    reward: Place
    """Reward checkpoint of value and reward model: folder or Hub id of a sequence classifier with num_labels=1, or of a
    LoRA adapter on one."""
    sharing: Literal["auto", "separate", "paired", "single"] = "auto"
    """Sharing plan. auto: `separate` without lora; with lora `single` where the checkpoints allow it, else `paired`."""
    lora: LoraConfig | None = None
    """LoRA adapters for policy and value; null is full fine-tuning."""
    value_model: Literal["own", "trunk"] = "own"
    """own: the value model has the reward model's weights to start from. trunk: it is a head on the policy's own states,
    which is cheaper and weaker; needs value_head_init=zero."""
    value_head_init: Literal["reward", "zero"] = "reward"
    """Where the value head starts: the reward model's score head, or zeros."""
    freeze_layers: NonNegativeInt = 0
    """Full fine-tuning: freeze embeddings and this many layers at the bottom; policy and reference then share them and
    their computation, value and reward model likewise."""
    quantization: Annotated[Literal["4bit", "8bit", "torchao-int8"] | None, RightGradients] = None
    """Hold frozen backbones in 4 bit (nf4) or 8 bit (int8) through bitsandbytes, or in 8 bit through torchao; heads, norms,
    embeddings and adapters stay in full precision, trained weights are never quantized. In full fine-tuning reference and
    reward model are, so that the KL to the reference starts at the rounding of its weights and not at zero."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Computation and frozen weights. bfloat16 keeps adapters, heads and trained weights in float32 and uses autocast.
    auto: bfloat16 where the device computes in it, else float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the models live; auto takes CUDA when there is a GPU."""
    offload: Literal["none", "cpu"] = "none"
    """cpu, with the models on a GPU: frozen weights live in page-locked host memory and are on the GPU only while a role
    that needs them runs; the policy's own backbone stays. Where weights are cut into shares (zero3, fsdp2), shares of
    backbones in which nothing is trained stay there, and a layer is on the GPU while it runs."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time in the update."""
    trust_remote_code: bool = False
    """Run the model code that a checkpoint brings along. Off unless you have read that code."""
    allow_pickle: bool = False
    """Convert pickled weights (.bin) of local folders to safetensors in the cache, loading nothing but tensors from them."""

    @model_validator(mode="after")
    def _plan_fits_lora(self) -> ModelsConfig:
        if self.sharing in ("paired", "single") and self.lora is None:
            raise ValueError(
                f"models.sharing={self.sharing} shares frozen weights between roles and needs models.lora; "
                "set models.lora={} for LoRA's defaults, or models.sharing=separate for full fine-tuning"
            )
        if self.freeze_layers and self.lora is not None:
            raise ValueError(
                f"models.freeze_layers={self.freeze_layers} is for full fine-tuning, and models.lora is set; LoRA freezes "
                "every layer already, so leave one of the two out"
            )
        if self.freeze_layers and self.quantization is not None:
            raise ValueError(
                f"models.quantization={self.quantization} finds nothing to quantize with "
                f"models.freeze_layers={self.freeze_layers}, whose frozen layers are shared with the trained ones and hold "
                "their precision; leave one of the two out"
            )
        if self.value_model == "trunk" and self.value_head_init != "zero":
            raise ValueError(
                "models.value_model=trunk puts the value head on the policy's states, which the reward model's score head "
                "was not made for; set models.value_head_init=zero"
            )
        return self


class DataConfig(Section):
    """The prompts."""

    prompts: Place
    """Text file (a prompt a line), .jsonl, .parquet or .csv file, or the name of a `datasets` data set."""
    column: Annotated[str, Field(min_length=1)] = "prompt"
    """Column that holds the prompt: text, or a list of chat messages (the chat template is then applied)."""
    split: Annotated[str, Field(min_length=1)] = "train"
    """Split of a `datasets` data set."""
    max_prompt_tokens: PositiveInt = 512
    """Longer prompts are left out; a warning says how many."""
    eval_prompts: Place | None = None
    """File or data set of the fixed evaluation prompts; null holds out some of `prompts`, drawn by seed: at most a tenth of
    them, but one where there are two."""
    eval_count: NonNegativeInt = 16
    """How many evaluation prompts are used, at most; 0 for none."""

    @model_validator(mode="after")
    def _evaluates(self) -> DataConfig:
        if self.eval_prompts is not None and self.eval_count == 0:
            raise ValueError(
                f"data.eval_prompts={shown(self.eval_prompts)} is given, and data.eval_count=0 takes none of them; leave one "
                "of the two out"
            )
        return self


class RewardSourceConfig(Section):
    """A reward beside the reward model's; weighted and summed with it."""

    function: str | None = None
    """`module:name` of a function (prompts, responses) -> one number per episode; both lists of text. It is called in every
    process, with that process's episodes."""
    url: str | None = None
    """HTTP endpoint: receives {"prompts": [...], "responses": [...]} by POST, answers {"rewards": [...]}."""
    weight: Finite = 1.0
    """Factor of this source in the sum."""
    timeout: Seconds = 60.0
    """Seconds to wait for one batch of rewards."""

    @model_validator(mode="after")
    def _one_kind(self) -> RewardSourceConfig:
        if (self.function is None) == (self.url is None):
            raise ValueError("an entry of rewards needs exactly one of function and url")
        return self


class RunConfig(Section):
    """The run folder and what is written there."""

    dir: Place = "runs/quartet"
    """Folder of the run; must not hold a run already."""
    seed: NonNegativeInt = 0
    """Seed of adapters, data order and sampling."""
    save_every: NonNegativeInt = 20
    """Iterations between checkpoints; 0 for none but the last."""
    keep: PositiveInt = 2
    """Checkpoints kept."""
    eval_every: NonNegativeInt = 10
    """Iterations between evaluations on the fixed prompts; 0 for none but first and last."""
    return_memory: bool | Literal["auto"] = "auto"
    """On the CPU: return the memory of freed tensors to the system at once, which takes less memory and more time. auto
    does so where the predicted peak is over half of the free memory, and with tensors of 4 MiB or more where tensors that
    come and go are over half of the predicted peak, as with LoRA; false never does."""
    parallel_passes: bool | Literal["auto"] = "auto"
    """On the CPU: policy and value take their passes of the update at the same time, each on half of the threads, which
    takes less time and the memory of both models' activations. For plans in which they are two backbones. auto does so
    in bfloat16, and in float32 with small models where compiled kernels multiply on an Intel processor, if the
    predicted peak is then at most half of the free memory."""
    trackers: tuple[Literal["tensorboard"], ...] = ()
    """Where metrics go besides metrics.jsonl."""


class DistributedConfig(Section):
    """How several processes share the work; they are started with torchrun."""

    engine: Literal["auto", "none", "ddp", "zero2", "zero3", "fsdp2"] = "auto"
    """ddp: every process holds all weights. zero2 (DeepSpeed): gradients and optimizer state are cut into shares. zero3
    (DeepSpeed) and fsdp2 (torch): weights too. auto: none for one process; for several ddp with lora and with what cannot
    be cut (quantization, freeze_layers, 8-bit Adam), else fsdp2."""
    gather_for_rollout: Literal["auto"] | bool = "auto"
    """zero3 and fsdp2: hold the whole policy while it generates, or fetch every layer in every step. auto: whole where it
    fits into half of the memory that is free after loading."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """What carries the tensors: nccl between GPUs, gloo between CPUs."""


class Config(Section):
    """A run."""

    models: ModelsConfig
    """Checkpoints and sharing."""
    data: DataConfig
    """Prompts."""
    rewards: tuple[RewardSourceConfig, ...] = ()
    """Reward sources beside the reward model."""
    rollout: RolloutConfig = RolloutConfig()
    """Sampling."""
    ppo: PPOConfig = PPOConfig()
    """Algorithm."""
    run: RunConfig = RunConfig()
    """Output."""
    distributed: DistributedConfig = DistributedConfig()
    """Several processes."""

    @model_validator(mode="after")
    def _batches_divide(self) -> Config:
        if self.rollout.batch_size % self.ppo.minibatches:
            raise ValueError(
                f"rollout.batch_size={self.rollout.batch_size} is not divisible by "
                f"ppo.minibatches={self.ppo.minibatches}; choose a divisor"
            )
        horizon = self.ppo.adaptive_kl_horizon
        if self.ppo.adaptive_kl_target is not None and horizon < self.rollout.batch_size:
            raise ValueError(
                f"ppo.adaptive_kl_horizon={horizon} is less than one iteration, rollout.batch_size={self.rollout.batch_size} "
                "episodes, and would throw ppo.kl_coef about or below zero; use a horizon of many iterations"
            )
        if self.ppo.missing_eos_penalty and self.rollout.stop is None:
            raise ValueError(
                f"ppo.missing_eos_penalty={self.ppo.missing_eos_penalty} would fall on every episode, because "
                "rollout.stop=null lets none stop; name a stop token or leave the penalty out"
            )
        return self
