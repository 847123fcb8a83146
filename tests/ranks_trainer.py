"""A Trainer on the tiny model, in as many processes as torchrun says: what tests/hf/training/test_ranks.py runs.

ranks_trainer.py FOLDER BATCH_SIZE RESUME
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from tiny import VOCABULARY, tiny_config, tiny_model, tiny_tokenizer
from transformers import TrainingArguments

from sense_v2.hf.memory import memory_of
from sense_v2.hf.training.callback import EngramCallback
from sense_v2.hf.training.ranks import attach_on_every_rank
from sense_v2.hf.training.trainer import EngramTrainer


def main(folder: Path, batch_size: int, resume: bool) -> None:
    torch.set_num_threads(1)
    arguments = TrainingArguments(
        str(folder / "run"),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        max_steps=4,
        lr_scheduler_type="constant",
        max_grad_norm=0.3,
        logging_steps=1,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    torch.manual_seed(1)
    model = attach_on_every_rank(tiny_model("llama"), tiny_config(folder), tiny_tokenizer())
    stream = np.tile(np.random.default_rng(0).integers(3, VOCABULARY, 40), 12).reshape(40, 12).tolist()
    trainer = EngramTrainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in stream],
        callbacks=[EngramCallback(row_rate=10.0)],
    )
    trainer.train(resume_from_checkpoint=resume)
    history = trainer.state.log_history
    found = {
        "mode": memory_of(model).storage.mode,
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in history if "grad_norm" in entry],
        # What this process sees in its mapping.
        "rows": memory_of(model).storage.own.weight.tolist(),
    }
    (folder / f"rank{arguments.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "resume")
