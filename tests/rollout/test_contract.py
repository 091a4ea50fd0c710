"""What every generation engine promises of a rollout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from quartet.models.backbone import Backbone
from quartet.models.heads import LogitHead
from quartet.models.plan import BackboneSpec
from quartet.models.roles import LanguageView
from quartet.records import Prompts, Rollout
from quartet.rollout import RolloutEngine, SamplingSettings
from quartet.rollout.dynamic import DynamicEngine
from quartet.rollout.static import StaticEngine
from quartet.rollout.vllm import VllmEngine
from quartet.rollout.vllm_colocate import Colocated
from quartet.rollout.vllm_server import Served
from vllm_stand_in import install, serving

MakeEngine = Callable[[LanguageView, SamplingSettings], RolloutEngine]
OWN: dict[str, MakeEngine] = {"dynamic": DynamicEngine, "static": StaticEngine}
INSTALLED = [
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("default"),
]
ENGINES = [*OWN, pytest.param("vllm", marks=INSTALLED), "vllm colocate stand-in", "vllm server stand-in"]
STOP, PAD, LENGTH = 7, 9, 10
SETTINGS = SamplingSettings(
    response_length=LENGTH, temperature=1.0, top_p=1.0, stop_id=STOP, pad_id=PAD, batch_rows=4, seed=2
)
PROMPTS = (3, 8, 1, 5, 4, 6, 2, 3, 7)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> LanguageView:
    """Twelve tokens and nearly flat logits: the stop token comes about once in twelve."""
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=12,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=PAD,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    folder = tmp_path_factory.mktemp("policy")
    model.save_pretrained(folder)
    spec = BackboneSpec("sft", str(folder), "language_model", trainable=False)
    return LanguageView(Backbone(spec, model, dtype=torch.float32), None, LogitHead(model))


@cache
def started(policy: LanguageView) -> Colocated:
    """Started once: it takes long."""
    return Colocated(policy, SETTINGS, share=0.05, tokens=64, trust_remote_code=False)


@pytest.fixture(params=ENGINES)
def make_engine(
    request: pytest.FixtureRequest, policy: LanguageView, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MakeEngine]:
    if request.param in OWN:
        yield OWN[request.param]
    elif request.param == "vllm":
        yield lambda policy, settings: VllmEngine(policy, settings, started(policy))
    elif request.param == "vllm colocate stand-in":
        install(monkeypatch)
        yield lambda policy, settings: VllmEngine(
            policy, settings, Colocated(policy, settings, share=0.3, tokens=64, trust_remote_code=False)
        )
    else:
        checkpoint = policy.backbone.spec.checkpoint
        with serving(checkpoint) as server:
            yield lambda policy, settings: VllmEngine(
                policy, settings, Served(policy, settings, server.url, timeout=20.0, names=(checkpoint,))
            )


def prompts(chosen: slice = slice(None)) -> Prompts:
    generator = torch.Generator().manual_seed(4)
    tokens = tuple(torch.randint(12, (length,), generator=generator) for length in PROMPTS)
    numbers = tuple(range(40, 40 + len(PROMPTS)))
    return Prompts(numbers[chosen], ("",) * len(numbers[chosen]), tokens[chosen])


def rollout(engine: RolloutEngine) -> Rollout:
    result = engine.generate(prompts())
    assert result.stopped.any(), "the case is meant to have early stops"
    assert not result.stopped.all(), "and responses that never stop"
    return result


def test_shapes_and_types(make_engine: MakeEngine, policy: LanguageView) -> None:
    given = prompts()
    result = make_engine(policy, SETTINGS).generate(given)
    shape = (len(PROMPTS), LENGTH)
    assert result.prompts is given
    assert (result.tokens.shape, result.tokens.dtype) == (shape, torch.int64)
    assert (result.response_mask.shape, result.response_mask.dtype) == (shape, torch.bool)
    assert (result.logprobs.shape, result.logprobs.dtype) == (shape, torch.float32)
    assert (result.stopped.shape, result.stopped.dtype) == (shape[:1], torch.bool)
    assert type(result.decode_steps) is int
    assert not any(t.requires_grad for t in (result.tokens, result.logprobs))


def test_a_response_is_a_prefix_that_ends_with_the_stop_token_or_at_full_length(
    make_engine: MakeEngine, policy: LanguageView
) -> None:
    result = rollout(make_engine(policy, SETTINGS))
    for tokens, mask, stopped in zip(
        result.tokens.tolist(), result.response_mask.tolist(), result.stopped, strict=True
    ):
        length = sum(mask)
        assert mask == [True] * length + [False] * (LENGTH - length)
        assert tokens[length:] == [PAD] * (LENGTH - length)
        assert STOP not in tokens[: length - 1]
        assert bool(stopped) == (tokens[length - 1] == STOP)
        assert stopped or length == LENGTH


def test_logprobs_are_kept_inside_the_mask_and_zero_outside(make_engine: MakeEngine, policy: LanguageView) -> None:
    result = rollout(make_engine(policy, SETTINGS))
    assert (result.logprobs[~result.response_mask] == 0).all()
    inside = result.logprobs[result.response_mask]
    assert (inside < 0).all()
    assert (inside > -10).all()


def test_the_sampled_pad_token_counts(make_engine: MakeEngine, policy: LanguageView) -> None:
    """Pad is a token of the vocabulary like others: only the mask says where a response ends."""
    result = rollout(make_engine(policy, SETTINGS))
    assert (result.tokens[result.response_mask] == PAD).any()


def test_padding_with_the_stop_token_stops_nothing(make_engine: MakeEngine, policy: LanguageView) -> None:
    """Many tokenizers have no pad token and use the end of the text for it."""
    expected = rollout(make_engine(policy, SETTINGS))
    found = rollout(make_engine(policy, replace(SETTINGS, pad_id=STOP)))
    assert torch.equal(found.stopped, expected.stopped)
    assert torch.equal(found.response_mask, expected.response_mask)
    assert (found.tokens[~found.response_mask] == STOP).all()


def test_without_a_stop_token_every_response_is_full(make_engine: MakeEngine, policy: LanguageView) -> None:
    result = make_engine(policy, replace(SETTINGS, stop_id=None)).generate(prompts())
    assert result.response_mask.all()
    assert not result.stopped.any()
    assert (result.tokens == STOP).any()


def test_decoding_ends_with_the_longest_response(make_engine: MakeEngine, policy: LanguageView) -> None:
    engine = make_engine(policy, replace(SETTINGS, batch_rows=len(PROMPTS)))
    result = engine.generate(prompts())
    short = result.response_mask.sum(-1).argsort()[:3].tolist()
    given = prompts()
    some = Prompts(tuple(given.episodes[i] for i in short), ("",) * 3, tuple(given.tokens[i] for i in short))
    alone = engine.generate(some)
    assert torch.equal(alone.tokens, result.tokens[short])
    longest = int(alone.response_mask.sum(-1).max())
    assert longest < LENGTH
    assert alone.decode_steps == longest - 1
    assert result.decode_steps == LENGTH - 1


def test_one_token_needs_no_decode_step(make_engine: MakeEngine, policy: LanguageView) -> None:
    result = make_engine(policy, replace(SETTINGS, response_length=1)).generate(prompts())
    assert result.tokens.shape == (len(PROMPTS), 1)
    assert result.response_mask.all()
    assert result.decode_steps == 0


def test_an_episode_samples_the_same_whatever_its_company(make_engine: MakeEngine, policy: LanguageView) -> None:
    whole = make_engine(policy, SETTINGS).generate(prompts())
    part = make_engine(policy, replace(SETTINGS, batch_rows=1)).generate(prompts(slice(3, 6)))
    assert torch.equal(part.tokens, whole.tokens[3:6])


def test_seed_and_episode_number_decide(make_engine: MakeEngine, policy: LanguageView) -> None:
    first = make_engine(policy, SETTINGS).generate(prompts())
    again = make_engine(policy, SETTINGS).generate(prompts())
    other = make_engine(policy, replace(SETTINGS, seed=3)).generate(prompts())
    renumbered = replace(prompts(), episodes=tuple(range(len(PROMPTS))))
    moved = make_engine(policy, SETTINGS).generate(renumbered)
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.logprobs, again.logprobs)
    assert not torch.equal(first.tokens, other.tokens)
    assert not torch.equal(first.tokens, moved.tokens)


def test_greedy_ignores_the_seed_and_takes_the_most_likely(make_engine: MakeEngine, policy: LanguageView) -> None:
    first = make_engine(policy, SETTINGS).generate(prompts(), greedy=True)
    other = make_engine(policy, replace(SETTINGS, seed=3)).generate(prompts(), greedy=True)
    assert torch.equal(first.tokens, other.tokens)
    inside = first.logprobs[first.response_mask]
    assert (inside.exp() >= 1 / 12).all()  # the most likely of twelve tokens has at least the mean probability


def test_engines_agree(policy: LanguageView) -> None:
    """Those that draw by the same numbers; vLLM has its own."""
    results = [engine(policy, SETTINGS).generate(prompts()) for engine in OWN.values()]
    assert torch.equal(results[0].tokens, results[1].tokens)
    assert torch.equal(results[0].response_mask, results[1].response_mask)
    torch.testing.assert_close(results[0].logprobs, results[1].logprobs, atol=1e-5, rtol=0)
