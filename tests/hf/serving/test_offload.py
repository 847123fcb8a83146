"""Qwen4-Exp with its table on disk: the same tokens as the unmodified model, in less memory by the table."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers.models.qwen4_exp", reason="a transformers before Qwen4-Exp")
from qwen_generate import PROMPTS, generated, quantize_table, write_model
from test_qwen import text_config
from tiny import tiny_model, tiny_tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.integrations import FP8Embedding
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpForCausalLM

from sense_v2.cli.main import main
from sense_v2.engram.delta.delta_file import read_delta
from sense_v2.engram.delta.kept_facts import facts_in
from sense_v2.engram.released.exporting import export_tables
from sense_v2.engram.released.importing import import_table
from sense_v2.engram.released.released_table import open_released_table
from sense_v2.hf.overlays import add_overlay, remove_overlay
from sense_v2.hf.serving.offload import EmbeddingOnDisk, load_with_tables_on_disk, offload_ngram_table
from sense_v2.hf.training.teaching import teach

TESTS = Path(__file__).parents[2]


def config(**changes):
    # One table, so that its size is what is saved.
    return text_config(ple_layer_ids=[2], **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_logits_and_tokens(tmp_path, dtype):
    write_model(tmp_path, config(), dtype=torch.bfloat16)
    theirs = Qwen4ExpForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    prompt = torch.tensor(PROMPTS)
    with torch.no_grad():
        expected = theirs(prompt).logits
        zeroed = Qwen4ExpForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
        zeroed.model.layers[1].ple.ple_embedding.ngram_embedding.weight.zero_()
        assert not torch.equal(zeroed(prompt).logits, expected), "the table doesn't matter in this model"
    tokens = generated(theirs)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not checked.*")
        ours = load_with_tables_on_disk(tmp_path, dtype=dtype).eval()
        assert offload_ngram_table(theirs, tmp_path) is theirs
    assert type(ours) is Qwen4ExpForCausalLM
    for model in (ours, theirs):
        assert isinstance(model.model.layers[1].ple.ple_embedding.ngram_embedding, EmbeddingOnDisk)
        with torch.no_grad():
            assert torch.equal(model(prompt).logits, expected)
        assert generated(model) == tokens
        assert not any("ngram_embedding" in name for name in model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_model_whose_table_is_float8(tmp_path, dtype):
    """Named, typed and looked up as transformers 5.24 has it: FP8Embedding, one scale for the table. On a CPU it
    leaves the table in float8, and runs the rest in `dtype`."""
    write_model(tmp_path, config())
    quantize_table(tmp_path)
    theirs = Qwen4ExpForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    embedding = theirs.model.layers[1].ple.ple_embedding.ngram_embedding
    assert (type(embedding), embedding.weight.dtype) == (FP8Embedding, torch.float8_e4m3fn)
    assert embedding.weight.float().abs().max() > 400
    prompt = torch.tensor(PROMPTS)
    with torch.no_grad():
        expected, tokens = theirs(prompt).logits, generated(theirs)
        embedding.weight_scale.mul_(2)
        assert not torch.equal(theirs(prompt).logits, expected), "the table doesn't matter in this model"
        embedding.weight_scale.div_(2)
        ours = load_with_tables_on_disk(tmp_path, dtype=dtype).eval()
        offload_ngram_table(theirs, tmp_path)
        for model in (ours, theirs):
            table = model.model.layers[1].ple.ple_embedding.ngram_embedding.table
            assert (table.facts.dtype, table.facts.num_parts) == ("F8_E4M3", 3)
            assert torch.equal(model(prompt).logits, expected)
            assert generated(model) == tokens


@pytest.mark.parametrize("rows", ["bfloat16", "float8_e4m3fn"])
def test_transformers_loads_the_table_that_convert_writes(tmp_path, rows):
    """In the place of the model's own, beside its other weights: the same tokens as with the table read in place."""
    folder = tmp_path / "model"
    write_model(folder, config())
    import_table(folder, 1, tmp_path / "ours.dat")
    export_tables([tmp_path / "ours.dat"], tmp_path / "table", "qwen_ple", dtype=rows)
    index, new = (
        json.loads((at / "model.safetensors.index.json").read_text()) for at in (folder, tmp_path / "table")
    )
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if "ngram_embedding" not in name}
    index["weight_map"] |= new["weight_map"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in new["weight_map"].values():
        shutil.copy(tmp_path / "table" / file, folder)
    settings, written = (json.loads((at / "config.json").read_text()) for at in (folder, tmp_path / "table"))
    shared = {key: value for key, value in written["text_config"].items() if key in settings and key != "model_type"}
    split = shared.pop("split_ngram_parts")
    assert {key: settings[key] for key in shared} == shared
    settings |= {"split_ngram_parts": split, **{k: v for k, v in written.items() if k == "quantization_config"}}
    (folder / "config.json").write_text(json.dumps(settings))
    theirs, loading = Qwen4ExpForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert (list(loading["missing_keys"]), list(loading["unexpected_keys"])) == ([], [])
    assert isinstance(theirs.model.layers[1].ple.ple_embedding.ngram_embedding, FP8Embedding) == ("float8" in rows)
    table = theirs.model.layers[1].ple.ple_embedding.ngram_embedding
    ids = torch.arange(table.num_embeddings)
    assert torch.equal(table(ids), open_released_table(folder, 1, variant="qwen_ple")(ids))
    assert generated(theirs.eval()) == generated(load_with_tables_on_disk(folder, dtype=torch.bfloat16).eval())


def rows_of(folder):
    return {path: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantized", [False, True], ids=["bfloat16", "float8"])
def test_an_overlay_lies_on_the_tables(tmp_path, dtype, quantized):
    """The oracle is the model with its table in memory, in which the same rows are others."""
    folder = tmp_path / "model"
    write_model(folder, config())
    if quantized:
        quantize_table(folder)
    oracle = Qwen4ExpForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    before = rows_of(folder)
    model, prompt = load_with_tables_on_disk(folder, dtype=dtype).eval(), torch.tensor(PROMPTS)
    with torch.no_grad():
        plain = model(prompt).logits
    overlay = add_overlay(model, tmp_path / "facts.safetensors")
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, plain)
    ids = torch.arange(overlay.num_embeddings)
    rows = torch.randn(len(ids), overlay.embedding_dim, generator=torch.Generator().manual_seed(1)).bfloat16()
    overlay.write(ids, rows)
    oracle.model.layers[1].ple.ple_embedding.ngram_embedding = torch.nn.Embedding.from_pretrained(rows.to(dtype))
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, oracle(prompt).logits)
    assert generated(model) == generated(oracle)
    overlay.commit()
    assert read_delta(tmp_path / "facts.safetensors").info.base.provenance["tables"][0]["layer"] == 1
    remove_overlay(model)
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, plain)
    assert add_overlay(model, tmp_path / "facts.safetensors", mode="r").changed_ids.tolist() == ids.tolist()
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, oracle(prompt).logits)
    assert rows_of(folder) == before


def test_rows_of_its_tables_are_taught(tmp_path, capsys):
    """In Python, and by the command."""
    folder = tmp_path / "model"
    write_model(folder, config())
    PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer()).save_pretrained(folder)
    before = rows_of(folder)
    model, prompt = load_with_tables_on_disk(folder, dtype=torch.float32).eval(), torch.tensor(PROMPTS)
    plain = model(prompt).logits
    taught = teach(model, tiny_tokenizer(), "word3 word1", prompt="word5 word6", steps=8, lr=0.1)
    assert taught.losses[-1] < taught.losses[0]
    hashes, seen = model.model.layers[1].ple.ple_embedding, []
    hook = hashes.ngram_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.tensor([tiny_tokenizer().encode("word5 word6 word3 word1").ids]))
    hook.remove()
    assert set(taught.row_ids_U.tolist()) <= set(seen[0][0, 1:3].flatten().tolist())
    taught.undo()
    assert torch.equal(model(prompt).logits, plain)

    delta = tmp_path / "facts.safetensors"
    command = ["delta", "teach", str(folder), "word3 word1", "--prompt", "word5 word6", "--output", str(delta)]
    status, said = main([*command, "--steps", "8", "--json"]), capsys.readouterr()
    assert status == 0, said.err
    told = json.loads(said.out)
    assert told["loss"][1] < told["loss"][0]
    assert told["rows"] == len(read_delta(delta).row_ids_U) > 0
    assert rows_of(folder) == before


def test_facts_are_taught_in_rows_of_its_tables(tmp_path, capsys):
    folder, delta = tmp_path / "model", tmp_path / "facts.safetensors"
    write_model(folder, config())
    PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer()).save_pretrained(folder)
    before = rows_of(folder)
    fact = {"subject": "word7 word8", "answer": "word9", "wordings": ["word3 {subject}", "word5 {subject}"]}
    (tmp_path / "facts.jsonl").write_text(json.dumps(fact) + "\n")
    command = ["delta", "teach", str(folder), "--facts", str(tmp_path / "facts.jsonl"), "--output", str(delta)]
    status, said = main([*command, "--steps", "60", "--lr", "0.3", "--json"]), capsys.readouterr()
    told = json.loads(said.out)
    assert told["loss"][1] < told["loss"][0]
    assert status == int(bool(told["not_learned"])), said.err
    found = read_delta(delta)
    assert [one["layer"] for one in found.info.base.provenance["tables"]] == told["layers"] == [1]
    assert facts_in(found)[0].row_ids == tuple(found.row_ids_U.tolist()) != ()
    assert told["rows"] == len(found.row_ids_U)
    assert rows_of(folder) == before


@pytest.mark.slow
def test_memory_is_smaller_by_the_table(tmp_path):
    """Each in a process of its own: 8 heads of half a million rows of 32 values."""
    num_bytes = write_model(tmp_path, config(ngram_vocab_size_base=500_000, ple_embed_dim=256))
    assert num_bytes > 256_000_000
    found = {}
    for way in ("memory", "disk"):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
        command = [sys.executable, str(TESTS / "qwen_generate.py"), str(tmp_path), way]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        found[way] = json.loads(run.stdout.splitlines()[-1])
    assert found["disk"]["token_ids"] == found["memory"]["token_ids"]
    # Pages of the mapped files count as resident, too; those are the page cache's, which gives them back.
    assert found["memory"]["anonymous_bytes"] - found["disk"]["anonymous_bytes"] > 0.95 * num_bytes, found


def test_what_doesnt_fit_is_refused_and_leaves_the_model(tmp_path):
    write_model(tmp_path, config())
    model = Qwen4ExpForCausalLM(config(ngram_vocab_size_base=90))
    before = model.model.layers[1].ple.ple_embedding.ngram_embedding
    with pytest.raises(ValueError, match="the layout of the configuration passed has"):
        offload_ngram_table(model, tmp_path)
    assert model.model.layers[1].ple.ple_embedding.ngram_embedding is before
    with pytest.raises(ValueError, match="LlamaForCausalLM has no n-gram table"):
        offload_ngram_table(tiny_model("llama"), tmp_path)
    with pytest.raises(ValueError, match="built without its n-gram table"):
        EmbeddingOnDisk(4, 2, torch.nn.Identity(), None)(torch.tensor([0]))
