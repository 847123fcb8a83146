"""A model that has learned already gets a memory: its own weights stay as they are, the memory learns beside them.

    python examples/retrofit.py                                         a small model, made on the spot
    python examples/retrofit.py --model Qwen/Qwen3-0.6B --corpus my_texts/ --steps 1000

About a minute on two cores; downloads nothing unless --model names something.
"""

import argparse
import dataclasses
import math

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.data.corpus import Batches, encode, read_corpus
from sense_v2.hf.saving.save import save_pretrained
from sense_v2.hf.training.callback import EngramCallback
from sense_v2.hf.training.fresh_model import END_OF_TEXT_ID, fresh_backbone, small_memory, train_bpe
from sense_v2.hf.training.trainer import EngramTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a model of the hub, or a folder")
parser.add_argument("--corpus", help="a file or a folder of text; the Python standard library otherwise")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--output", default="runs/retrofit")
options = parser.parse_args()

corpus = read_corpus([options.corpus] if options.corpus else None, max_bytes=2_000_000)
if options.model:
    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer, separator_id = AutoTokenizer.from_pretrained(options.model), model.config.eos_token_id
else:
    tokenizer, separator_id = train_bpe(corpus.train_texts[:40]), END_OF_TEXT_ID
    model = fresh_backbone(tokenizer.get_vocab_size(), seed=0)


def blocks(texts: list[str]) -> list[dict[str, torch.Tensor]]:
    stream = encode(texts, tokenizer, separator_id=separator_id)
    cut = Batches(stream, batch_size=1, sequence_length=128, seed=0).blocks
    return [{"input_ids": torch.tensor(ids).long(), "labels": torch.tensor(ids).long()} for ids in cut]


training, held_out = blocks(corpus.train_texts), blocks(corpus.held_out_texts)[:32]


def settings(learning_rate: float) -> TrainingArguments:
    return TrainingArguments(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=learning_rate,
        warmup_steps=10,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


if not options.model:
    print("a model learns without memory, so that there is one to retrofit")
    Trainer(model, settings(3e-3), train_dataset=training).train()

own = {name: value.clone() for name, value in model.state_dict().items()}
config = dataclasses.replace(small_memory(options.output), table_size=200_000, layer_indices=[1])
attach_engram(model, config, tokenizer)
trainer = EngramTrainer(
    model,
    settings(3e-3),
    train_dataset=training,
    eval_dataset=held_out,
    callbacks=[EngramCallback(train_backbone=False, row_rate=30)],  # its own weights are frozen
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
save_pretrained(model, options.output, tokenizer=tokenizer)
print(f"held-out perplexity {math.exp(before):.1f} as it was, {math.exp(after):.1f} with memory")

detach_engram(model)
assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
print("taken off again, the model is what it was, bit for bit")
