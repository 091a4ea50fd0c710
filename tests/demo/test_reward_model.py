"""The reward model: its loss against numbers by hand, and its adapter folder on a tiny random model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quartet.demo.ratings import RatedSentence, RatingSplit
from quartet.demo.reward_loss import correlation, pair_accuracy, pairwise_loss
from quartet.demo.reward_model import RewardRecipe, ensure_reward_model, train_reward_model
from quartet.errors import CheckpointError

WORDS = ["good", "bad", "film", "plot", "cast", "and", "the", "is"]
RECIPE = RewardRecipe(steps=3, batch_rows=8, learning_rate=0.02, lora_rank=2, lora_alpha=4)


def _silent(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers; its pad token is its end token, as in the demo's model."""
    folder = tmp_path_factory.mktemp("model")
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<x>", "<end>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "eos_token": "<end>", "pad_token": "<end>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=2,
        eos_token_id=2,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _sentences(count: int, seed: int) -> tuple[RatedSentence, ...]:
    """Sentences whose rating follows from their last word, so that only the state at the last token tells it."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(2, 9, (), generator=generator))
        words = [WORDS[int(index)] for index in torch.randint(len(WORDS), (length,), generator=generator)]
        found.append(RatedSentence(" ".join(words), WORDS.index(words[-1]) - 4.0))
    return tuple(found)


SPLIT = RatingSplit(reward_train=_sentences(40, 1), reward_held_out=_sentences(20, 2), evaluation=(), ppo=())


@pytest.fixture(params=[False, True], ids=["float32", "bfloat16"])
def bfloat16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the CPU is taken to compute in bfloat16."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: request.param)
    return bool(request.param)


def test_the_loss_is_the_mean_over_pairs_that_differ_enough() -> None:
    scores = torch.tensor([1.0, 0.0, 3.0])
    ratings = torch.tensor([2.0, 1.0, 0.5])
    # Pairs a rating apart: (0, 1) with a score difference of 1, (0, 2) with -2; (1, 2) is only 0.5 apart.
    expected = (math.log(1 + math.exp(-1.0)) + math.log(1 + math.exp(2.0))) / 2
    assert float(pairwise_loss(scores, ratings, min_gap=1.0)) == pytest.approx(expected, abs=1e-6)


def test_a_batch_without_pairs_has_loss_zero_and_no_gradient() -> None:
    scores = torch.tensor([1.0, -1.0], requires_grad=True)
    loss = pairwise_loss(scores, torch.tensor([0.2, 0.9]), min_gap=1.0)
    loss.backward()
    assert loss.item() == 0.0
    assert scores.grad is not None
    assert scores.grad.tolist() == [0.0, 0.0]


def test_pair_accuracy_counts_pairs_and_halves_ties() -> None:
    ratings = torch.tensor([3.0, 2.0, 0.0, -0.5])
    # Pairs a rating apart: 0>1 right, 0>2 wrong, 0>3 right, 1>2 wrong, 1>3 tied; 2 and 3 are too close.
    scores = torch.tensor([1.0, 0.5, 2.0, 0.5])
    assert pair_accuracy(scores, ratings, min_gap=1.0) == pytest.approx(2.5 / 5)


def test_correlation_is_pearsons() -> None:
    # Deviations (-1, 0, 1) and (-2, 1, 1): covariance 3, variances 2 and 6.
    assert correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 3.0, 3.0])) == pytest.approx(3 / 12**0.5)


def _reloaded_scores(model: Any, model_dir: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores by the models' own forward, left to pad and to find the last token itself; with the ratings."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    batch = tokenizer([sentence.text for sentence in SPLIT.reward_held_out], return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits[:, 0].float(), torch.tensor([sentence.rating for sentence in SPLIT.reward_held_out])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_the_saved_folder_reproduces_the_scores(model_dir: Path, tmp_path: Path, bfloat16: bool) -> None:
    out = tmp_path / "reward"
    report = train_reward_model(model_dir, SPLIT, out, seed=0, say=_silent, recipe=RECIPE)
    base = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=1, dtype=torch.float32)
    scores, ratings = _reloaded_scores(PeftModel.from_pretrained(base, out), model_dir)
    tolerance = 0.02 * report.score_sd if bfloat16 else 1e-5
    assert float(scores.mean()) == pytest.approx(report.score_mean, abs=tolerance)
    assert float(scores.std()) == pytest.approx(report.score_sd, abs=tolerance)
    if not bfloat16:
        assert pair_accuracy(scores, ratings, min_gap=1.0) == pytest.approx(report.pair_accuracy)
    again, _ = _reloaded_scores(AutoPeftModelForSequenceClassification.from_pretrained(out, num_labels=1), model_dir)
    assert torch.equal(again, scores)


def test_the_adapter_is_float32_trained_and_names_its_base(model_dir: Path, tmp_path: Path, bfloat16: bool) -> None:
    out = tmp_path / "reward"
    train_reward_model(model_dir, SPLIT, out, seed=0, say=_silent, recipe=RECIPE)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["task_type"], config["r"], config["lora_alpha"]) == ("SEQ_CLS", 2, 4)
    assert Path(config["base_model_name_or_path"]) == model_dir.resolve()
    tensors = load_file(out / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert tensors["base_model.model.score.weight"].shape == (1, 32)
    lora_b = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    assert len(lora_b) == 2 * 7
    assert all(bool(tensor.abs().max() > 0) for tensor in lora_b)
    assert (out / "tokenizer.json").is_file()


def test_training_learns_what_the_last_token_tells(model_dir: Path, tmp_path: Path) -> None:
    recipe = RewardRecipe(steps=30, batch_rows=16, learning_rate=0.01, lora_rank=4, lora_alpha=2, cut_weight=0.0)
    split = RatingSplit(_sentences(480, 1), SPLIT.reward_held_out, (), ())
    report = train_reward_model(model_dir, split, tmp_path / "reward", seed=0, say=_silent, recipe=recipe)
    assert report.sentences == 480
    assert report.held_out == 20
    assert report.pair_accuracy > 0.95


def test_the_seed_decides_everything_and_the_callers_random_state_stays(model_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_reward_model(model_dir, SPLIT, tmp_path / name, seed=seed, say=_silent, recipe=RECIPE)
    assert torch.equal(torch.get_rng_state(), before)
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_the_reward_model_is_trained_once_per_recipe_seed_and_data(model_dir: Path, tmp_path: Path) -> None:
    def ensure(seed: int, split: RatingSplit = SPLIT) -> tuple[Path, object]:
        return ensure_reward_model(model_dir, split, tmp_path, seed=seed, say=said.append, recipe=RECIPE)

    said: list[str] = []
    folder, report = ensure(0)
    said.clear()
    assert ensure(0) == (folder, report)
    assert len(said) == 1
    assert "cached" in said[0]
    assert ensure(1)[0] != folder
    assert ensure(0, RatingSplit(SPLIT.reward_train[1:], SPLIT.reward_held_out, (), ()))[0] != folder
    assert {path.name.rpartition("-")[0] for path in tmp_path.iterdir()} == {"reward-model"}


def test_an_incomplete_cached_reward_model_is_refused(model_dir: Path, tmp_path: Path) -> None:
    folder, _ = ensure_reward_model(model_dir, SPLIT, tmp_path, seed=0, say=_silent, recipe=RECIPE)
    (folder / "report.json").write_text("{")
    with pytest.raises(CheckpointError, match="is incomplete; delete the folder"):
        ensure_reward_model(model_dir, SPLIT, tmp_path, seed=0, say=_silent, recipe=RECIPE)


def test_an_existing_folder_is_not_overwritten(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists already"):
        train_reward_model(model_dir, SPLIT, tmp_path, seed=0, say=_silent, recipe=RECIPE)
