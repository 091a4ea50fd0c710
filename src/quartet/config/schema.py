"""The configuration's fields. Every field has a docstring here and a reader elsewhere (a test checks both)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from quartet.config.rollout import RolloutConfig
from quartet.config.values import (
    Finite,
    NonNegative,
    NonNegativeInt,
    Place,
    Positive,
    PositiveInt,
    RightGradients,
    Section,
    UnitInterval,
)


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


class RewardSourceConfig(Section):
    """A reward beside the reward model's; weighted and summed with it."""

    function: str | None = None
    """`module:name` of a function (prompts, responses) -> one number per episode; both lists of text."""
    url: str | None = None
    """HTTP endpoint: receives {"prompts": [...], "responses": [...]} by POST, answers {"rewards": [...]}."""
    weight: Finite = 1.0
    """Factor of this source in the sum."""
    timeout: Positive = 60.0
    """Seconds to wait for one batch of rewards."""

    @model_validator(mode="after")
    def _one_kind(self) -> RewardSourceConfig:
        if (self.function is None) == (self.url is None):
            raise ValueError("an entry of rewards needs exactly one of function and url")
        return self


class OptimizerConfig(Section):
    """The optimizer of policy and value."""

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    """AdamW with decoupled weight decay. adamw8bit holds its state in 8 bit through bitsandbytes; paged_adamw8bit, on a
    GPU, also lets the state move to host memory under pressure."""
    betas: tuple[UnitInterval, UnitInterval] = (0.9, 0.999)
    """Adam's moment decays."""
    eps: Positive = 1.0e-5
    """Adam's epsilon."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning-rate schedule over the iterations, after the warm-up; linear and cosine end at zero."""
    warmup_iterations: NonNegativeInt = 0
    """Iterations over which the learning rate rises linearly from zero; fewer than ppo.iterations."""


class PPOConfig(Section):
    """The algorithm (arXiv 1707.06347; for language models arXiv 2403.17031)."""

    iterations: PositiveInt = 100
    """Passes of rollout, scoring, advantages and update."""
    epochs: PositiveInt = 4
    """Passes over the episodes of one iteration in the update."""
    minibatches: PositiveInt = 1
    """Optimizer steps per epoch; divides rollout.batch_size."""
    microbatch_rows: PositiveInt = 8
    """Sequences in one forward and backward, where they are as long as the longest; in one process more of shorter ones, up to
    as many tokens. Changes memory and speed, never the gradient."""
    learning_rate: NonNegative = 1.0e-5
    """Learning rate of the policy."""
    value_learning_rate: NonNegative | None = None
    """Learning rate of the value model; null takes learning_rate."""
    kl_coef: NonNegative = 0.05
    """Weight of the per-token KL penalty against the reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the per-token KL (http://joschu.net/blog/kl-approx.html)."""
    adaptive_kl_target: Positive | None = None
    """Target of the mean KL per response in nats; kl_coef is then adapted to it (arXiv 1909.08593)."""
    adaptive_kl_horizon: Positive = 10_000.0
    """Episodes over which the adaptive controller doubles or halves kl_coef."""
    clip: Positive = 0.2
    """The policy's ratio is clipped to [1 - clip, 1 + clip_high]."""
    clip_high: Positive | None = None
    """Upper clip of the ratio; null takes clip."""
    value_clip: Positive | None = 0.2
    """Values are clipped to this distance from the old values; null turns it off."""
    value_coef: NonNegative = 0.1
    """Weight of the value loss."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    gamma: UnitInterval = 1.0
    """Discount."""
    lam: UnitInterval = 0.95
    """Lambda of generalised advantage estimation (arXiv 1506.02438)."""
    whiten_rewards: bool = False
    """Scale the per-token rewards to unit variance, keeping their mean."""
    whiten_advantages: bool = True
    """Scale the advantages of the iteration to mean 0 and variance 1."""
    missing_eos_penalty: NonNegative | None = None
    """Subtracted from the score of a response that did not stop by itself."""
    score_placement: Literal["stop", "after_stop"] = "stop"
    """Token that receives the score: the last one, or one step later where there is room (as TRL did)."""
    max_grad_norm: Positive | None = 1.0
    """Gradients of policy and value together are scaled to at most this norm; null turns it off."""
    max_bad_steps: PositiveInt = 4
    """A minibatch whose loss or gradient is not finite takes no optimizer step; this many in a row end the run."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and schedule."""

    @model_validator(mode="after")
    def _warms_up(self) -> PPOConfig:
        warmup = self.optimizer.warmup_iterations
        if warmup >= self.iterations:
            raise ValueError(
                f"ppo.optimizer.warmup_iterations={warmup} leaves none of ppo.iterations={self.iterations} at the full "
                "learning rate; lower it"
            )
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
    in bfloat16, where the predicted peak is then at most half of the free memory."""
    trackers: tuple[Literal["tensorboard"], ...] = ()
    """Where metrics go besides metrics.jsonl."""


class DistributedConfig(Section):
    """How several processes share the work; they are started with torchrun."""

    engine: Literal["auto", "none", "ddp", "zero2", "zero3", "fsdp2"] = "auto"
    """ddp: every process holds all weights. zero2 (DeepSpeed): gradients and optimizer state are cut into shares. zero3
    (DeepSpeed) and fsdp2 (torch): weights too. auto: none for one process; for several ddp with lora, else fsdp2."""
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
        if self.ppo.missing_eos_penalty and self.rollout.stop is None:
            raise ValueError(
                f"ppo.missing_eos_penalty={self.ppo.missing_eos_penalty} would fall on every episode, because "
                "rollout.stop=null lets none stop; name a stop token or leave the penalty out"
            )
        return self
