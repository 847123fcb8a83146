"""The demo measures step times on copies: nothing that it reports or saves changes."""

import dataclasses

import torch

from sense_v2.core.config import TrainConfig
from sense_v2.engram.tokenizer import EngramTokenizerBuilder
from sense_v2.hf.attach import attach_engram
from sense_v2.hf.data.corpus import Batches, encode, read_corpus
from sense_v2.hf.experiments import from_scratch as demo
from sense_v2.hf.training.fresh_model import fresh_backbone, train_bpe


def test_measuring_step_times_changes_nothing(corpus, tmp_path, monkeypatch):
    """Neither a weight nor a row, nor a byte of the table's folder, nor the random numbers that come after."""
    monkeypatch.setattr(demo, "BLOCK_STEPS", 1)
    monkeypatch.setattr(demo, "STEP_TIME_ROUNDS", 6)
    config = demo.demo_config(tmp_path)
    config.engram.table_size, config.engram.init_std = 2000, 0.1
    settings = TrainConfig(steps=3, batch_size=2, sequence_length=32, warmup_steps=1)
    text = read_corpus([corpus])
    tokenizer = train_bpe(text.train_texts)
    builder = EngramTokenizerBuilder(tokenizer)
    builder.build_mapping(config.engram.shadow_map_path)
    batches = Batches(encode(text.train_texts, tokenizer, separator_id=0), batch_size=2, sequence_length=32, seed=0)
    plain = fresh_backbone(builder.vocab_size, 0).eval()
    remembering = attach_engram(fresh_backbone(builder.vocab_size, 0), config.engram)
    remembering.engram.storage.flush()

    def state():
        weights = {
            name: tensor.clone() for model in (plain, remembering) for name, tensor in model.state_dict().items()
        }
        files = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
        return weights, files, torch.get_rng_state(), [parameter.grad for parameter in plain.parameters()]

    before = state()
    own = dataclasses.replace(config.engram, storage_path=str(tmp_path / "step_times" / "engram_table.dat"))
    times = demo.measure_step_times(plain, own, batches, settings)
    after = state()
    assert times["ratio"] > 0
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())
    assert before[1] == after[1]
    assert torch.equal(before[2], after[2])
    assert before[3] == after[3]
    assert not plain.training
    assert not (tmp_path / "step_times").exists()
