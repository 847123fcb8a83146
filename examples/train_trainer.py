"""A small model and its memory trained by transformers' Trainer, on a corpus that is read while it trains.

    python examples/train_trainer.py                                    the Python standard library
    python examples/train_trainer.py --corpus my_texts/ --steps 2000    your own text, JSON lines or Parquet
    python examples/train_trainer.py --resume                           on from the last checkpoint

About a minute on two cores; downloads nothing. `pip install 'sense-v2[stream]'`.
"""

import argparse
import dataclasses
import itertools
import math
from pathlib import Path

from transformers import TrainingArguments

from sense_v2.hf.attach import attach_engram
from sense_v2.hf.data.corpus import standard_library
from sense_v2.hf.data.streaming import PackedStream, open_documents
from sense_v2.hf.saving.save import save_pretrained
from sense_v2.hf.training.callback import EngramCallback
from sense_v2.hf.training.fresh_model import END_OF_TEXT_ID, fresh_backbone, small_memory, train_bpe
from sense_v2.hf.training.trainer import EngramTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--corpus", help="a file, a folder, or a dataset of the hub")
parser.add_argument("--steps", type=int, default=120)
parser.add_argument("--output", default="runs/trainer")
parser.add_argument("--resume", action="store_true")
options = parser.parse_args()

# The first documents are held out, the others are trained on.
documents = open_documents(options.corpus or standard_library()[::5])
held_out, training = documents.take(20), documents.skip(20)
tokenizer = train_bpe([example["text"] for example in itertools.islice(training, 40)])
blocks = {"tokenizer": tokenizer, "sequence_length": 128, "separator_id": END_OF_TEXT_ID}

model = fresh_backbone(tokenizer.get_vocab_size(), seed=0)
config = dataclasses.replace(small_memory(options.output), table_size=200_000)
attach_engram(model, config, tokenizer)

trainer = EngramTrainer(
    model,
    TrainingArguments(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        warmup_steps=20,
        lr_scheduler_type="cosine",
        logging_steps=20,
        save_steps=60,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
    ),
    train_dataset=PackedStream(training, seed=0, buffer_blocks=256, **blocks),
    eval_dataset=PackedStream(held_out, buffer_blocks=1, **blocks).take(32),
    callbacks=[EngramCallback(row_rate=30)],
)
before = trainer.evaluate()["eval_loss"]
trainer.train(resume_from_checkpoint=options.resume)
after = trainer.evaluate()["eval_loss"]
save_pretrained(model, Path(options.output), tokenizer=tokenizer)
steps = trainer.state.global_step
print(f"held-out perplexity {math.exp(before):.1f} before, {math.exp(after):.1f} after {steps} steps")
print(f"sense-engram generate {options.output} 'def main('    writes with it")
