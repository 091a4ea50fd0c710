"""The configuration's section on sampling."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import model_validator

from quartet.config.values import Number, Place, Positive, PositiveInt, Probability, Seconds, Section


class VllmConfig(Section):
    """vLLM as the rollout engine."""

    mode: Literal["colocate", "server"] = "colocate"
    """colocate: an engine that this run starts, on the device of the models. server: a running `vllm serve`."""
    url: str | None = None
    """Address of the server, such as http://localhost:8000; a token goes into the environment as QUARTET_VLLM_TOKEN."""
    folder: Place | None = None
    """Folder through which each iteration's adapter or weights are handed over; a server has to see it under the same path.
    null takes the system's temporary folder."""
    gpu_memory_utilization: Probability = 0.3
    """colocate: the share of the device's memory that vLLM takes for its weights and cache while it generates."""
    timeout: Seconds = 600.0
    """server: seconds to wait for one response, or for the weights to be loaded."""


class RolloutConfig(Section):
    """How responses are sampled."""

    batch_size: PositiveInt = 64
    """Episodes per iteration."""
    response_length: PositiveInt = 64
    """Most tokens of a response."""
    temperature: Positive = 1.0
    """Softmax temperature of sampling; the trainer's log-probabilities use it too."""
    top_p: Probability = 1.0
    """Nucleus sampling. Below 1 the sampler is not the policy that is trained, and KL estimates are biased."""
    stop: Annotated[str | int | None, Number] = "eos"
    """Token that ends a response: `eos`, another token's text or id, or null to run to response_length."""
    engine: Literal["auto", "static", "dynamic", "vllm"] = "auto"
    """Generation engine. static: preallocated cache with refill; dynamic: any model with a cache; vllm: vLLM, which has to
    be installed or served (docs/rollout.md); auto takes static where it can drive the model, else dynamic."""
    vllm: VllmConfig = VllmConfig()
    """Where vLLM runs, with engine=vllm."""
    cuda_graphs: bool = True
    """Static engine on a GPU: record decoding steps as CUDA graphs and play them back. Nothing changes elsewhere."""
    merge_adapters: bool | Literal["auto"] = "auto"
    """Static engine with LoRA: generate with weights to which the policy's adapter is added, copies that are made for each
    rollout and dropped after it. Takes less time and a second policy's memory meanwhile; auto does so in bfloat16, where the
    run's predicted peak stays as it is."""
    correct_rollout: bool = False
    """Compute the log-probabilities of the responses once more as training does, so that the update starts at a ratio of
    exactly 1; for engines or precisions that differ (see rollout/logprob_gap)."""
    batch_rows: PositiveInt = 32
    """Rows decoded at once; more is faster and needs more memory for the cache. Scoring computes as many at once on a GPU."""

    @model_validator(mode="after")
    def _vllm_fits(self) -> RolloutConfig:
        if self.engine != "vllm":
            if self.vllm != VllmConfig():
                raise ValueError(
                    f"rollout.vllm is given, and rollout.engine={self.engine} does not use it; set rollout.engine=vllm or "
                    "leave rollout.vllm out"
                )
            return self
        if (self.vllm.mode == "server") != (self.vllm.url is not None):
            raise ValueError(
                "rollout.vllm.mode=server needs rollout.vllm.url, the address of a running `vllm serve`"
                if self.vllm.url is None
                else f"rollout.vllm.url={self.vllm.url!r} is for rollout.vllm.mode=server; set the mode or leave the url out"
            )
        if self.temperature != 1.0 and self.top_p < 1.0:
            raise ValueError(
                f"rollout.engine=vllm cannot give log-probabilities at rollout.temperature={self.temperature} before "
                f"rollout.top_p={self.top_p} cuts the distribution; set one of the two to 1.0, or use rollout.engine=static"
            )
        return self
