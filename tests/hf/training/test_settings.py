"""TrainConfig and `--set NAME=VALUE` -> TrainingArguments: types, names, and what the run itself decides."""

import pytest

from sense_v2.core.config import TrainConfig
from sense_v2.core.errors import CommandError
from sense_v2.hf.training.settings import checked_trainer, parse_set, training_arguments


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("bf16=true", True),
        ("gradient_accumulation_steps=4", 4),
        ("adam_epsilon=1e-6", 1e-6),
        ("report_to=tensorboard", "tensorboard"),
        ("report_to=[tensorboard, wandb]", ["tensorboard", "wandb"]),
        ("report_to=none", "none"),
        ("run_name=12", "12"),
        ("run_name=a = b", "a = b"),
        ("lr_scheduler_kwargs={min_lr_rate: 0.1}", {"min_lr_rate": 0.1}),
        ("dataloader_prefetch_factor=null", None),
        ("neftune_noise_alpha=5", 5),
        ("optim=adamw_torch", "adamw_torch"),
    ],
)
def test_a_value_is_read_by_the_fields_type(text, value):
    (found,) = parse_set([text]).values()
    assert found == value
    assert type(found) is type(value)


def test_several_are_put_together_and_the_last_one_counts():
    assert parse_set(["bf16=true", "optim=sgd", "bf16=false"]) == {"bf16": False, "optim": "sgd"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bf16", r"--set bf16.*--set NAME=VALUE"),
        ("bf16=perhaps", r"bf16 = 'perhaps'.*of type bool"),
        ("gradient_accumulation_steps=1.5", r"gradient_accumulation_steps = 1\.5.*of type int"),
        ("adam_epsilon=tiny", r"adam_epsilon = 'tiny'.*of type float"),
        ("gradient_acumulation_steps=4", r"no field 'gradient_acumulation_steps'.*gradient_accumulation_steps"),
        ("zzz=4", r"no field 'zzz'"),
        ("max_steps=3", r"max_steps.*--steps"),
        ("learning_rate=1", r"learning_rate.*--learning-rate"),
        ("output_dir=x", r"output_dir.*--output"),
        ("warmup_steps=3", r"warmup_steps.*train\.warmup_steps in a configuration file"),
        ("save_total_limit=3", r"save_total_limit.*two"),
    ],
)
def test_what_is_wrong_is_named_with_the_way_out(text, message):
    with pytest.raises(CommandError, match=message):
        parse_set([text])


def test_the_configuration_files_values_are_checked_alike():
    assert checked_trainer({"bf16": True, "report_to": ["none"]}) == {"bf16": True, "report_to": ["none"]}
    with pytest.raises(CommandError, match=r"bf16 = 'yes'.*of type bool"):
        checked_trainer({"bf16": "yes"})
    with pytest.raises(CommandError, match="did you mean 'bf16'"):
        checked_trainer({"bf61": True})


def test_train_config_keeps_its_meaning(tmp_path):
    config = TrainConfig(steps=70, batch_size=6, learning_rate=0.01, weight_decay=0.3, warmup_steps=5, seed=2**40 + 3)
    arguments = training_arguments(config, tmp_path, {"gradient_accumulation_steps": 3}, saves=True, evaluates=True)
    assert (arguments.max_steps, arguments.learning_rate, arguments.weight_decay) == (70, 0.01, 0.3)
    # Three of two sequences make the six of a step.
    assert arguments.per_device_train_batch_size == 2
    assert (arguments.adam_beta1, arguments.adam_beta2) == (0.9, 0.99)
    assert (arguments.eval_steps, arguments.save_steps, arguments.save_total_limit) == (50, 100, 2)
    assert arguments.logging_steps == 1
    assert arguments.seed == 3  # NumPy's generator takes no more
    assert arguments.report_to == []
    own = training_arguments(config, tmp_path, {"adam_beta2": 0.95, "logging_steps": 7}, saves=False, evaluates=False)
    assert (own.adam_beta2, own.logging_steps, own.save_strategy, own.eval_strategy) == (0.95, 7, "no", "no")


def test_an_accumulation_that_does_not_divide_the_batch_is_refused(tmp_path):
    with pytest.raises(CommandError, match=r"batch_size = 8 .*gradient_accumulation_steps = 3"):
        training_arguments(TrainConfig(), tmp_path, {"gradient_accumulation_steps": 3}, saves=False, evaluates=False)


def test_a_long_run_keeps_about_a_thousand_entries(tmp_path):
    arguments = training_arguments(TrainConfig(steps=100_001), tmp_path, {}, saves=False, evaluates=False)
    assert arguments.logging_steps == 101
