"""Scoring and advantages of real rollouts: what lands where, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from checkpoints import EOS, plain_model
from pipeline import Pipeline, rollout_of
from quartet.config import PPOConfig
from quartet.errors import TrainingError
from quartet.models.roles import LanguageView, ScalarView
from quartet.ops.rewards import ScorePlacement, value_mask
from quartet.records import Scored
from quartet.rewards.function import FunctionReward
from quartet.run.setup import score_with
from quartet.stages.advantages import compute_advantages
from quartet.stages.batching import SequenceTable, microbatches, scoring_rows
from quartet.stages.scoring import score_rollout
from tiny import TinyRun

PROMPTS = [[5, 9, 30], [7], [64, 65, 66, 67, 68], [1, 2]]
RESPONSES = [[40, 41, EOS], [50, 51, 52, 53], [EOS], [60, 61, 62, 63]]


def test_sequences_hold_prompt_and_response_without_a_gap() -> None:
    table = SequenceTable.of(rollout_of(PROMPTS, RESPONSES))
    whole = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    assert [table.length(row) for row in range(len(table))] == [len(sequence) for sequence in whole]
    for row, sequence in enumerate(whole):
        assert table.input_ids[row, : len(sequence)].tolist() == sequence
    seen = []
    for rows, sequences in microbatches(table, [3, 0, 2, 1], 2):
        assert len(rows) == 2
        assert sequences.input_ids.shape[1] == max(len(whole[row]) for row in rows)
        for row, ids, prompt, response in zip(
            rows.tolist(), sequences.input_ids, sequences.prompt_lengths, sequences.response_lengths, strict=True
        ):
            assert ids[: prompt + response].tolist() == whole[row]
            assert prompt == len(PROMPTS[row])
        seen += rows.tolist()
    assert sorted(seen) == [0, 1, 2, 3]


def table_of(lengths: list[int]) -> SequenceTable:
    """Sequences whose prompt is one token, but the last one's, whose response is."""
    prompts = [1] * (len(lengths) - 1) + [max(lengths[-1] - 1, 1)]
    responses = [[2] * (length - prompt) for length, prompt in zip(lengths, prompts, strict=True)]
    return SequenceTable.of(rollout_of([[1] * prompt for prompt in prompts], responses))


@pytest.mark.parametrize(
    ("lengths", "packed", "expected"),
    [
        ([10, 2, 2, 2, 2, 5, 2, 9, 2], False, [[0], [7, 5], [1, 2, 3, 4, 6, 8]]),  # up to 20 tokens; 18 make no more
        ([8, 7, 6, 5, 4], False, [[0], [1, 2], [3, 4]]),  # 16; 14
        ([8, 7, 6, 5, 4], True, [[0, 1], [2, 3, 4]]),  # 16; 15, and 18 with padding, of 2 (3 + 7)
        ([8, 4, 1, 1, 1, 1, 1], True, [[0, 1], [2, 3, 4, 5, 6]]),  # all seven are 17 tokens
        ([8, 1, 1, 1, 1, 1, 1, 1], True, [[0], [1, 2, 3, 4, 5, 6, 7]]),  # 15 tokens, but 64 with padding, of 16
    ],
)
def test_microbatches_of_short_sequences_hold_more_of_them(
    lengths: list[int], packed: bool, expected: list[list[int]]
) -> None:
    """As many tokens as the asked number of the longest sequences, in as few and as equal microbatches as that allows."""
    table = table_of(lengths)
    found = [rows.tolist() for rows, _ in microbatches(table, range(len(lengths)), 2, fill=True, packed=packed)]
    assert found == expected
    assert [len(rows) for rows, _ in microbatches(table, range(1, 5), 2)] == [2, 2]


def cuts(lengths: list[int]) -> Iterator[list[list[int]]]:
    """All ways to cut a list."""
    for places in itertools.product([False, True], repeat=len(lengths) - 1):
        ends = [0, *(place for place, cut in enumerate(places, start=1) if cut), len(lengths)]
        yield [lengths[start:end] for start, end in itertools.pairwise(ends)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_other_cut_is_better(size: int, packed: bool) -> None:
    """Of all cuts of sequences sorted by length none has fewer microbatches, nor as many and a smaller largest one."""

    def cost(part: list[int]) -> int:
        return sum(part) if packed else len(part) * part[0]

    generator = torch.Generator().manual_seed(size)
    for _ in range(20):
        lengths = sorted(torch.randint(2, 30, (8,), generator=generator).tolist(), reverse=True)
        most, widest = size * lengths[0], lengths[-1] - 1 + lengths[0] - 1
        most_padded = size * widest if packed else most
        sizes = [[(cost(part), len(part) * part[0]) for part in cut] for cut in cuts(lengths)]
        allowed = [s for s in sizes if all(tokens <= most and padded <= most_padded for tokens, padded in s)]
        parts = microbatches(table_of(lengths), range(len(lengths)), size, fill=True, packed=packed)
        found = [[lengths[row] for row in rows.tolist()] for rows, _ in parts]
        assert list(itertools.chain(*found)) == lengths
        assert (len(found), max(map(cost, found))) == min((len(s), max(s)[0]) for s in allowed)


def test_only_a_processor_that_holds_the_weights_takes_fewer_rows_at_once() -> None:
    assert [scoring_rows(rows, "cpu", cut=False) for rows in (4, 16, 32)] == [4, 16, 16]
    assert scoring_rows(32, "cuda", cut=False) == scoring_rows(32, "cpu", cut=True) == 32


def test_scoring_takes_rows_as_planned(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(tiny_run(**{"rollout.batch_rows": 32}))
    taken = []
    table = SequenceTable.rows
    monkeypatch.setattr(SequenceTable, "rows", lambda self, rows: (taken.append(len(rows)), table(self, rows))[1])
    pipeline.score(rollout_of(PROMPTS * 5, RESPONSES * 5))
    assert taken[:2] == [16, 4]
    assert set(taken) == {16, 4}


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_scores_are_those_of_the_reward_checkpoint(rows: int, tiny_run: TinyRun, library: Any) -> None:
    pipeline = Pipeline(tiny_run(**{"rollout.batch_rows": rows}))
    scored = pipeline.score(rollout_of(PROMPTS, RESPONSES))
    model: Any = plain_model(library.path("llama", "reward"), task="classifier")
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([prompt + response])).logits[0, 0]
        torch.testing.assert_close(scored.scores[row], expected, rtol=1e-5, atol=1e-5)


def test_values_follow_the_placement_of_the_score(tiny_run: TinyRun) -> None:
    """`after_stop` needs the value one step after the last token, where there is room: there it is the reward's."""
    pipeline = Pipeline(tiny_run())
    rollout = rollout_of(PROMPTS, RESPONSES)
    stop, after = (
        score_rollout(rollout, pipeline.roles, temperature=1.0, placement=placement, rows=4)
        for placement in ("stop", "after_stop")
    )
    assert torch.equal(stop.value_mask, rollout.response_mask)
    assert after.value_mask.sum(-1).tolist() == [4, 4, 2, 4]
    torch.testing.assert_close(after.values[rollout.response_mask], stop.values[rollout.response_mask])
    last = torch.stack([after.values[0, 3], after.values[2, 1]])
    torch.testing.assert_close(last, after.scores[[0, 2]], rtol=1e-5, atol=1e-5)


def test_further_sources_are_added(tiny_run: TinyRun) -> None:
    """With their weights; they are given the prompts' and the responses' text, without stop token and padding."""
    pipeline, rollout, heard = Pipeline(tiny_run()), rollout_of(PROMPTS, RESPONSES), []

    def mine(prompts: list[str], responses: list[str]) -> list[float]:
        heard.append((prompts, responses))
        return [1.0, 2.0, 3.0, 4.0]

    source = FunctionReward.from_callable(mine, weight=0.5)
    plain, summed = (score_with(pipeline.config, chosen, pipeline.loaded, rollout) for chosen in ([], [source]))
    torch.testing.assert_close(summed.scores - plain.scores, torch.tensor([0.5, 1.0, 1.5, 2.0]), rtol=0, atol=1e-5)
    decode = pipeline.loaded.decode
    texts = [decode(torch.tensor([token for token in response if token != EOS])) for response in RESPONSES]
    assert heard == [([f"prompt {row}" for row in range(4)], texts)]
    assert texts[2] == ""


GIVERS: dict[str, tuple[Any, str, str]] = {
    "policy": (None, "", "models.sft"),
    "reward model": (ScalarView, "scores", "models.reward"),
    "value model": (ScalarView, "forward", "ppo.value_learning_rate"),
    "reference": (LanguageView, "forward", "models.sft"),
}
"""Who gives numbers of episodes, in which method, and the key that its message names."""


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("giver", GIVERS)
def test_a_number_that_is_not_finite_names_its_episode(
    giver: str, bad: float, tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline(tiny_run())
    rollout = rollout_of(PROMPTS, RESPONSES)
    rollout = dataclasses.replace(rollout, prompts=dataclasses.replace(rollout.prompts, episodes=(40, 41, 42, 43)))
    kind, method, key = GIVERS[giver]
    if kind is None:
        rollout.logprobs[2, 0] = bad
    else:
        whole = getattr(kind, method)

        def spoiled(self: Any, sequences: Any, *given: Any, **options: Any) -> Any:
            found = whole(self, sequences, *given, **options)
            tensor = found[0] if isinstance(found, tuple) else found
            tensor.view(len(tensor), -1)[sequences.prompt_lengths == 5, 0] = bad
            return found

        monkeypatch.setattr(kind, method, spoiled)
    said = rf"^the {giver} gave {bad} to {{}} \(prompt 'prompt 2'\); look at {key}, or"
    with pytest.raises(TrainingError, match=said.format("episode 42")):
        pipeline.score(rollout)
    held_out = dataclasses.replace(rollout.prompts, episodes=(-1, -2, -3, -4))
    with pytest.raises(TrainingError, match=said.format("evaluation prompt 3")):
        pipeline.score(dataclasses.replace(rollout, prompts=held_out))


def test_weights_that_are_not_finite_end_in_one_sentence(tiny_run: TinyRun) -> None:
    """Not in an index error of the sampler."""
    pipeline = Pipeline(tiny_run())
    with torch.no_grad():
        pipeline.roles.policy.backbone.model.get_output_embeddings().weight[3] = float("nan")
    with pytest.raises(TrainingError, match="policy"):
        pipeline.advantages(pipeline.score(pipeline.rollout()))


def scored_by_hand(placement: ScorePlacement, values: list[list[float]]) -> Scored:
    """Three tokens, the last of them the stop token, and two that go on without one."""
    rollout = rollout_of([[5, 6], [7]], [[40, 41, EOS], [50, 51]], width=5)
    rollout = dataclasses.replace(
        rollout,
        logprobs=torch.tensor([[-1.0, -2.0, -3.0, 0.0, 0.0], [-1.0, -2.0, 0.0, 0.0, 0.0]]),
        stopped=torch.tensor([True, False]),
    )
    return Scored(
        rollout,
        ref_logprobs=torch.tensor([[-1.5, -1.0, -3.0, 0.0, 0.0], [-1.0, -2.0, 0.0, 0.0, 0.0]]),
        values=torch.tensor(values),
        value_mask=value_mask(rollout.response_mask, placement),
        scores=torch.tensor([2.0, 1.0]),
    )


BY_HAND = PPOConfig(gamma=1.0, lam=0.5, whiten_advantages=False, missing_eos_penalty=9.0)


def test_advantages_by_hand() -> None:
    """Every number written out."""
    scored = scored_by_hand("stop", [[0.1, 0.2, 0.3, 0.0, 0.0], [0.0] * 5])
    found = compute_advantages(scored, BY_HAND, kl_coef=0.2)
    torch.testing.assert_close(found.rewards, torch.tensor([[-0.1, 0.2, 2.0, 0.0, 0.0], [0.0, -8.0, 0.0, 0.0, 0.0]]))
    # deltas: -0.1 + 0.2 - 0.1 = 0; 0.2 + 0.3 - 0.2 = 0.3; 2.0 - 0.3 = 1.7
    advantages = torch.tensor([[0.575, 1.15, 1.7, 0.0, 0.0], [-4.0, -8.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(found.advantages, advantages)
    returns = torch.tensor([[0.675, 1.35, 2.0, 0.0, 0.0], [-4.0, -8.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(found.returns, returns)
    expected = {"reward/score": 1.5, "kl/reference": -0.25, "kl/coef": 0.2, "response/length": 2.5}
    # Scores of 2 and 1 - 9, less 0.2 times -0.5 nats of the first episode.
    expected |= {"reward/total": (2.1 - 8.0) / 2, "response/stopped_fraction": 0.5}
    assert {name: found.metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_after_the_stop_there_is_a_return_and_no_advantage() -> None:
    """The score lands one step after the last token, whose value is to be learned too."""
    scored = scored_by_hand("after_stop", [[0.1, 0.2, 0.3, 0.4, 0.0], [0.0] * 5])
    ppo = BY_HAND.model_copy(update={"score_placement": "after_stop"})
    found = compute_advantages(scored, ppo, kl_coef=0.2)
    torch.testing.assert_close(found.rewards, torch.tensor([[-0.1, 0.2, 0.0, 2.0, 0.0], [0.0, 0.0, -8.0, 0.0, 0.0]]))
    # deltas: -0.1 + 0.2 - 0.1 = 0; 0.2 + 0.3 - 0.2 = 0.3; 0.4 - 0.3 = 0.1; 2.0 - 0.4 = 1.6
    advantages = torch.tensor([[0.375, 0.75, 0.9, 0.0, 0.0], [-2.0, -4.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(found.advantages, advantages)
    returns = torch.tensor([[0.475, 0.95, 1.2, 2.0, 0.0], [-2.0, -4.0, -8.0, 0.0, 0.0]])
    torch.testing.assert_close(found.returns, returns)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("placement", ["stop", "after_stop"])
def test_padding_columns_change_no_metric(estimator: Any, placement: Any, tiny_run: TinyRun) -> None:
    pipeline = Pipeline(tiny_run(**{"ppo.score_placement": placement}))
    ppo = PPOConfig(kl_estimator=estimator, score_placement=placement, missing_eos_penalty=1.0, whiten_rewards=True)
    found = []
    for width in (5, 9):
        scored = pipeline.score(rollout_of(PROMPTS, RESPONSES, width=width))
        found.append(compute_advantages(scored, ppo, kl_coef=0.1))
    assert found[0].metrics == pytest.approx(found[1].metrics, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(found[0].advantages, found[1].advantages[:, :5], rtol=1e-5, atol=1e-6)
    assert (found[1].advantages[:, 5:] == 0).all()
