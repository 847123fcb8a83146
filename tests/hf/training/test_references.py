"""TRL's references beside a memory that trains: they stay, or the Trainer says what is wrong."""

import copy
import gc

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_copies import logits, with_memory
from test_trainer_modes import hf_tokenizer
from transformers import TrainerCallback

from sense_v2.hf.memory import memory_of
from sense_v2.hf.training import callback
from sense_v2.hf.training.callback import EngramCallback

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
WORDS = [{"prompt": "word1 word2", "chosen": f" word{n} word5", "rejected": f" word{n} word7"} for n in range(8)]


def dpo(model, folder, *, ref_model=None, callbacks=(), **settings):
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        str(folder / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **settings,
    )
    return DPOTrainer(
        model,
        ref_model,
        args=config,
        train_dataset=Dataset.from_list(WORDS),
        processing_class=hf_tokenizer(),
        callbacks=[EngramCallback(), *callbacks],
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


def test_a_copy_is_a_reference_and_none_without_memory_is(tmp_path, monkeypatch):
    model = with_memory(tmp_path / "table")
    trainer = dpo(model, tmp_path, ref_model=copy.deepcopy(model))
    trainer.train()
    assert first_loss(trainer) == pytest.approx(0.6931, abs=1e-4)
    memory_of(model).storage.close()
    bare = type(model)(model.config)
    del trainer, model
    gc.collect()
    model = with_memory(tmp_path / "other")
    monkeypatch.setattr(callback, "living_memories", list)  # other tests' live on
    with pytest.warns(UserWarning, match=r"reference of this Trainer has no memory.*copy\.deepcopy\(model\)"):
        dpo(model, tmp_path, ref_model=bare).train()


def test_a_resumed_run_wants_a_reference_of_before(tmp_path):
    model = with_memory(tmp_path / "table")
    trainer = dpo(model, tmp_path, ref_model=copy.deepcopy(model))
    trainer.state.global_step = 1
    with pytest.raises(ValueError, match=r"goes on at step 1.*those of that step.*from_pretrained\(FOLDER\)"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
