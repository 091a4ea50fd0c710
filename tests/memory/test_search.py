"""The search picks the known cheapest change and says why the cheaper ones fail."""

from dataclasses import replace
from typing import Any

import pytest

from quartet.config import parse_config
from quartet.memory.choices import choices_of
from quartet.memory.command import estimator_for
from quartet.memory.report import describe, reason
from quartet.memory.search import Option, changed, combinations, options, search
from quartet.models.loading import plan_for

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 256,
    "vocab_size": 500,
}


def peak(values: dict[str, Any], change: dict[str, Any]) -> float:
    """Predicted peak of a changed configuration."""
    config = changed(parse_config(values), change)
    estimator = estimator_for(config)
    plan = plan_for(config.models, estimator.sft, estimator.reward)
    return estimator.estimate(plan, choices_of(config, estimator.device)).peak.peak


def test_combinations_come_cheapest_first() -> None:
    axes = [[Option("a", 1, 0.0, True), Option("a", 2, 1.0)], [Option("b", 1, 0.0, True), Option("b", 2, 1.5)]]
    assert list(combinations(axes)) == [({}, 0.0), ({"a": 2}, 1.0), ({"b": 2}, 1.5), ({"a": 2, "b": 2}, 2.5)]


def test_the_cheapest_that_fits(hollow: Any) -> None:
    values = hollow(SIZES, **{"models.dtype": "float32", "ppo.microbatch_rows": 4, "rollout.batch_rows": 2})
    values["rollout"] |= {"batch_size": 8, "response_length": 16}
    values["data"]["max_prompt_tokens"] = 16
    # The update needs most: half the rows make it smaller, and nothing else that costs as little does.
    halved, given = peak(values, {"ppo.microbatch_rows": 2}), peak(values, {})
    assert halved < given < 1.05 * peak(values, {"rollout.batch_rows": 1})
    config = parse_config(values)
    memory = int(halved + given) // 2
    found = search(config, estimator_for(config), memory)
    assert found.chosen is not None
    assert found.chosen.change == {"ppo.microbatch_rows": 2}
    assert found.chosen.config.ppo.microbatch_rows == 2
    assert [candidate.change for candidate in found.nearer] == [{}, {"rollout.batch_rows": 1}]
    for candidate in found.nearer:
        assert candidate.exceeded is not None
        assert candidate.exceeded.phase == "update"
        assert "too much" in reason(candidate, memory)


def test_what_fits_is_left_alone(hollow: Any) -> None:
    config = parse_config(hollow(SIZES))
    found = search(config, estimator_for(config), 2**40)
    assert found.chosen is not None
    assert (found.chosen.change, found.nearer) == ({}, ())


def test_sharing_is_the_first_thing_to_change_under_lora(hollow: Any) -> None:
    values = hollow(SIZES, **{"models.lora": {"r": 4}, "models.sharing": "separate", "models.dtype": "float32"})
    # Weights of bfloat16 files are mapped on a CPU whichever plan: compare what a GPU would hold.
    config = parse_config(values)
    assert [o.value for o in options(config, estimator_for(config))[0]] == ["separate", "paired", "single"]
    full = parse_config(hollow(SIZES))
    assert [o.value for o in options(full, estimator_for(full))[0]] == ["auto"]


def test_nothing_fits(hollow: Any) -> None:
    values = hollow(SIZES)
    config = parse_config(values)
    found = search(config, estimator_for(config), 2**16)
    assert found.chosen is None
    # Full fine-tuning: 12 bytes a trained parameter at least.
    estimator = estimator_for(config)
    least = estimator.estimate(
        plan_for(config.models, estimator.sft, estimator.reward), choices_of(config, estimator.device)
    )
    trained = sum(role.trained_parameters for role in least.roles)
    assert found.smallest.peak > 12 * trained
    assert all(candidate.at_fewest or candidate.exceeded for candidate in found.nearer)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "as given"),
        ({"models.gradient_checkpointing": True}, "models.gradient_checkpointing=true"),
        ({"ppo.microbatch_rows": 2, "models.quantization": None}, "ppo.microbatch_rows=2, models.quantization=null"),
    ],
)
def test_describe(change: dict[str, Any], expected: str) -> None:
    assert describe(change) == expected


def test_optimizer_state_in_8_bit_is_offered_to_full_fine_tuning(hollow: Any) -> None:
    wide = SIZES | {"vocab_size": 4000}
    values = hollow(wide, **{"models.dtype": "float32", "models.device": "cuda", "rollout.batch_rows": 1})
    values["ppo"] = {"microbatch_rows": 1}
    config = parse_config(values)
    names = {option.key: [o.value for o in axis] for axis in options(config, estimator_for(config)) for option in axis}
    assert names["ppo.optimizer.name"] == ["adamw", "adamw8bit", "paged_adamw8bit"]
    eight, given = peak(values, {"ppo.optimizer.name": "adamw8bit"}), peak(values, {})
    parameters = 4000 * 64 * 2
    assert given - eight > 5.9 * parameters  # of 8 bytes a parameter, 2 and a scale for every 256 are left
    nested = changed(config, {"ppo.optimizer.name": "adamw8bit", "ppo.microbatch_rows": 1})
    assert (nested.ppo.optimizer.name, nested.ppo.microbatch_rows) == ("adamw8bit", 1)
    lora = parse_config(hollow(SIZES, **{"models.lora": {"r": 4}, "models.device": "cuda"}))
    assert "ppo.optimizer.name" not in {axis[0].key for axis in options(lora, estimator_for(lora))}


def test_what_offloading_cannot_move_is_not_offered(hollow: Any) -> None:
    values = hollow(SIZES, **{"models.lora": {"r": 4}, "models.device": "cuda", "models.sharing": "paired"})
    config = parse_config(values)
    found = search(config, estimator_for(config), 2**16)
    assert found.chosen is None
    tried = [candidate.change for candidate in found.nearer]
    assert {"models.offload": "cpu"} in tried
    assert not any("models.offload" in change and change.get("models.quantization") == "8bit" for change in tried)


@pytest.mark.parametrize(("sharing", "offered"), [("separate", True), ("paired", False)])
def test_where_weights_are_cut_only_what_learns_nothing_is_offloaded(hollow: Any, sharing: str, offered: bool) -> None:
    values = hollow(SIZES, **{"models.lora": {"r": 4}, "models.device": "cuda", "models.sharing": sharing})
    config = parse_config(values)
    found = search(config, estimator_for(config), 2**16, world_size=2, engine="fsdp2")
    tried = [candidate.change for candidate in found.nearer if "models.sharing" not in candidate.change]
    assert ({"models.offload": "cpu"} in tried) is offered


def test_what_is_offloaded_does_not_count_against_what_fits(hollow: Any) -> None:
    """Where trained and frozen weights together are too much, and the trained ones alone are not."""
    values = hollow(SIZES | {"vocab_size": 20_000}, **{"models.device": "cuda", "models.gradient_checkpointing": True})
    values["ppo"] = {"microbatch_rows": 1, "optimizer": {"name": "adamw8bit"}}
    values["rollout"] = {"batch_rows": 1, "batch_size": 2, "response_length": 8}
    values["data"]["max_prompt_tokens"] = 8
    config = parse_config(values)
    estimator = estimator_for(config)
    plan, choices = plan_for(config.models, estimator.sft, estimator.reward), choices_of(config, estimator.device)
    away = estimator.estimate(plan, replace(choices, offload="cpu")).peak.peak
    all_weights = estimator.holdings.ledger(plan, choices).fixed("every phase").peak
    assert away < all_weights
    found = search(config, estimator, int(away + all_weights) // 2)
    assert found.chosen is not None
    assert found.chosen.change == {"models.offload": "cpu"}
    assert search(config, estimator, int(away) - 1).chosen is None


def test_what_needs_least_is_found_among_all(hollow: Any) -> None:
    """Also where others' weights alone say that they need more."""
    config = parse_config(hollow(SIZES | {"vocab_size": 20_000}, **{"models.lora": {"r": 4}, "models.device": "cuda"}))
    estimator = estimator_for(config)
    found = search(config, estimator, 2**16)
    peaks = {}
    for candidate in found.nearer:
        choices = choices_of(candidate.config, estimator.device)
        if (choices.microbatch_rows, choices.batch_rows, choices.checkpointing) == (1, 1, True):
            plan = plan_for(candidate.config.models, estimator.sft, estimator.reward)
            peaks[str(candidate.change)] = estimator.estimate(plan, choices).peak.peak
    assert len(peaks) > 4
    assert str(found.smallest_change) == min(peaks, key=lambda change: peaks[change])
    assert found.smallest.peak == min(peaks.values())


def test_what_fits_as_given_is_found_where_fewer_rows_leave_more_kernels(hollow: Any) -> None:
    """On a CPU in bfloat16 each batch has kernels of its own: one row at once needs more than the given eight."""
    values = hollow(SIZES, **{"models.dtype": "bfloat16", "models.lora": {"r": 4}})
    values["rollout"] = {"batch_size": 64, "response_length": 16}
    values["data"]["max_prompt_tokens"] = 16
    config = parse_config(values)
    estimator = estimator_for(config)
    given = peak(values, {})
    assert given < peak(values, {"ppo.microbatch_rows": 1, "rollout.batch_rows": 1})
    found = search(config, estimator, int(given) + 1)
    assert found.chosen is not None
    assert found.chosen.change == {}


def test_what_needs_least_may_have_many_rows(hollow: Any) -> None:
    values = hollow(SIZES, **{"models.dtype": "bfloat16", "models.gradient_checkpointing": True})
    values["models"]["freeze_layers"] = 1
    values["ppo"] = {"microbatch_rows": 4, "optimizer": {"name": "adamw8bit"}}
    values["rollout"] = {"batch_size": 64, "response_length": 16, "batch_rows": 4}
    values["data"]["max_prompt_tokens"] = 16
    config = parse_config(values)
    estimator = estimator_for(config)
    found = search(config, estimator, 2**16)
    assert found.chosen is None
    plan = plan_for(config.models, estimator.sft, estimator.reward)
    peaks = {}
    for candidate in found.nearer:
        choices = choices_of(candidate.config, estimator.device)
        peaks[str(candidate.change)] = estimator.estimate(plan, choices).peak.peak
    assert len(peaks) == 9
    assert found.smallest.peak == min(peaks.values()) == peaks[str(found.smallest_change)]
