"""TRL's references beside a memory that trains: they stay, or the Trainer says what is wrong."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_copies import logits, with_memory
from test_trainer_modes import hf_tokenizer
from transformers import TrainerCallback

from sense_v2.hf.memory import memory_of
from sense_v2.hf.training.callback import EngramCallback

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
WORDS = [{"prompt": "word1 word2", "chosen": f" word{n} word5", "rejected": f" word{n} word7"} for n in range(8)]


def dpo(model, folder, *, ref_model=None, callbacks=(), **settings):
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        str(folder / "run"),
        per_device_train_batch_size=2,
        learning_rate=0.01,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **{"max_steps": 2, "save_strategy": "no", **settings},
    )
    return DPOTrainer(
        model,
        ref_model,
        args=config,
        train_dataset=Dataset.from_list(WORDS),
        processing_class=hf_tokenizer(),
        callbacks=[EngramCallback(checkpoints="stay"), *callbacks],
    )


def first_loss(trainer):
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


class Reference(TrainerCallback):
    """What TRL takes for the reference, after each step."""

    def __init__(self, adapter):
        self.adapter, self.seen = adapter, []

    def on_step_end(self, args, state, control, model=None, **more):
        from trl.trainer.utils import use_adapter

        training = model.training
        with use_adapter(model, self.adapter):
            self.seen.append(logits(model))
        self.trained = logits(model)
        model.train(training)


@pytest.mark.parametrize("adapter", [None, "ref"])
def test_the_reference_of_an_adapter_has_the_memory_before_training(tmp_path, adapter):
    model = with_memory(tmp_path / "table")
    torch.manual_seed(2)
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=adapter is None)
    model = get_peft_model(model, config)
    before = logits(model)
    looking = Reference(adapter)
    trainer = dpo(model, tmp_path, callbacks=[looking])
    if adapter is None:
        del model.peft_config["ref"]
    trainer.train()
    assert first_loss(trainer) == pytest.approx(0.6931, abs=1e-4)
    for seen in looking.seen:
        assert torch.equal(seen, before)
    assert not torch.equal(looking.trained, before)
    assert memory_of(model).reference is None


def test_a_copy_is_a_reference_and_none_without_memory_is(tmp_path, recwarn):
    model = with_memory(tmp_path / "table")
    other = copy.deepcopy(model)  # lives beside, and is no reference
    trainer = dpo(model, tmp_path, ref_model=copy.deepcopy(model))
    trainer.train()
    assert first_loss(trainer) == pytest.approx(0.6931, abs=1e-4)
    assert not [one for one in recwarn if "has no memory" in str(one.message)]
    bare = type(model)(model.config)
    memory_of(model).storage.close()
    model = with_memory(tmp_path / "other")
    with pytest.warns(UserWarning, match=r"reference of this Trainer has no memory.*copy\.deepcopy\(model\)"):
        dpo(model, tmp_path, ref_model=bare).train()
    logits(other)
    assert not any(layer._forward_pre_hooks for layer in memory_of(other))


def test_a_resumed_run_wants_a_reference_of_before(tmp_path):
    model = with_memory(tmp_path / "table")
    trainer = dpo(model, tmp_path, ref_model=copy.deepcopy(model), save_strategy="steps", save_steps=2)
    trainer.train()
    resumed = dpo(model, tmp_path, ref_model=copy.deepcopy(model), max_steps=3)
    with pytest.raises(ValueError, match=r"goes on at step 2.*those of that step.*from_pretrained\(FOLDER\)"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    beside, bare = copy.deepcopy(model), type(model)(model.config)  # of the same table, and no reference
    with pytest.warns(UserWarning, match="reference of this Trainer has no memory"):
        dpo(model, tmp_path, ref_model=bare, max_steps=3).train(
            resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2")
        )
    assert memory_of(beside).table.path == memory_of(model).table.path
