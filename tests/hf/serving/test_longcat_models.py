"""LongCat-Flash-Lite on transformers' LongCat-Flash, its tables on disk: the logits of an embedding all in memory."""

import copy
import dataclasses
import inspect
import json

import pytest
import torch
from test_longcat import (
    EOS,
    HEADS,
    HIDDEN,
    LARGEST,
    PROJECTIONS,
    TABLES,
    VOCABULARY,
    longcat_config,
    released_rows,
    slow_rows,
)

pytest.importorskip("transformers.models.longcat_flash", reason="a transformers before LongCat-Flash")
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LongcatFlashConfig,
    LongcatFlashForCausalLM,
    PreTrainedTokenizerFast,
)

from sense_v2.engram.optim import RowAdam
from sense_v2.engram.released.find_tables import released_config
from sense_v2.engram.released.importing import import_table
from sense_v2.engram.variants import variant_config
from sense_v2.hf.attach import attach_engram, decoder_layers
from sense_v2.hf.load import from_pretrained
from sense_v2.hf.memory import attached_memory
from sense_v2.hf.overlays import remove_overlay
from sense_v2.hf.saving.save import save_pretrained
from sense_v2.hf.serving.longcat_models import attach_longcat_tables, load_longcat
from sense_v2.hf.training.teaching import teach

# What transformers 5.24 calls the state of earlier tokens, and before it.
NAME = "cache" if "cache" in inspect.signature(LongcatFlashForCausalLM.forward).parameters else "past_key_values"
SIZES = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "ffn_hidden_size": 32,
    "expert_ffn_hidden_size": 16,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 3,
    "zero_expert_num": 1,
    "moe_topk": 2,
    "routed_scaling_factor": 6,
    "rope_theta": 5000.0,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
}


class InMemory(torch.nn.Module):
    """The embedding of a whole sequence in plain torch, table by table."""

    def __init__(self, word, tables, projections):
        super().__init__()
        self.word, self.tables, self.projections = word, tables, projections

    def forward(self, ids_BT):
        out_BTC = self.word(ids_BT)
        row_ids_BTH = torch.tensor([slow_rows(ids_T) for ids_T in ids_BT.tolist()])
        first = 0
        for head, (table, projection) in enumerate(zip(self.tables, self.projections, strict=True)):
            out_BTC = out_BTC + table[row_ids_BTH[..., head] - first] @ projection.T
            first += len(table)
        return out_BTC / (1 + len(self.tables))


def write_model(folder):
    """Write a checkpoint with the released names; return the same model all in memory, (backbone, embedding)."""
    torch.manual_seed(0)
    sizes = {**SIZES, "routed_scaling_factor": 6.0}
    backbone = LongcatFlashForCausalLM(
        LongcatFlashConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, eos_token_id=EOS, **sizes)
    ).eval()
    with torch.no_grad():  # not the small numbers that a model begins with, of which nothing follows
        backbone.model.embed_tokens.weight.normal_(0, 1)
    backbone.save_pretrained(folder)
    tables = released_rows(torch.float32)
    generator = torch.Generator().manual_seed(8)
    projections = [torch.randn(HIDDEN, HIDDEN // HEADS, generator=generator) * 0.3 for _ in range(HEADS)]
    more = {TABLES.format(head): table for head, table in enumerate(tables)}
    more |= {PROJECTIONS.format(head): weight for head, weight in enumerate(projections)}
    more["model.mtp.layers.0.eh_proj.weight"] = torch.zeros(2, 2)
    save_file(more, folder / "ngrams.safetensors", metadata={"format": "pt"})
    index = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    index |= dict.fromkeys(more, "ngrams.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    settings = longcat_config(**SIZES, num_hidden_layers=4, torch_dtype="float32")
    (folder / "config.json").write_text(json.dumps(settings))
    return backbone, InMemory(backbone.model.embed_tokens, tables, projections)


@pytest.fixture
def saved(tmp_path):
    """The folder of a small model, and what `write_model` returns."""
    return (tmp_path / "model", *write_model(tmp_path / "model"))


def prompts(length=11, batch=2):
    ids_BT = torch.randint(8, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))
    ids_BT[0, 4] = ids_BT[0, 5] = ids_BT[1, 8] = EOS
    return ids_BT


def expected_logits(backbone, embedding, ids_BT):
    with torch.no_grad():
        return backbone(inputs_embeds=embedding(ids_BT), use_cache=False).logits


def test_the_logits_of_the_embedding_in_memory(saved):
    folder, backbone, embedding = saved
    ids_BT = prompts()
    expected = expected_logits(backbone, embedding, ids_BT)
    model = load_longcat(folder).eval()
    assert type(model) is LongcatFlashForCausalLM
    assert model.config.num_layers == 2
    with torch.no_grad():
        torch.testing.assert_close(model(ids_BT).logits, expected, rtol=0, atol=1e-6)
        assert not torch.allclose(backbone(ids_BT).logits, expected, atol=1e-2), (
            "the tables don't matter in this model"
        )
    assert not any("embedders" in name for name in model.state_dict())
    other = attach_longcat_tables(copy.deepcopy(backbone), folder)
    with torch.no_grad():
        torch.testing.assert_close(other(ids_BT).logits, expected, rtol=0, atol=1e-6)


def test_a_cache_in_pieces_gives_the_whole(saved):
    folder, backbone, embedding = saved
    ids_BT = prompts()
    expected = expected_logits(backbone, embedding, ids_BT)
    model = load_longcat(folder).eval()
    for cuts in ([3, 4, 5, 6, 9], range(1, 11), [8]):
        cache, pieces, first = None, [], 0
        for end in [*cuts, ids_BT.shape[1]]:
            with torch.no_grad():
                out = model(ids_BT[:, first:end], **{NAME: cache}, use_cache=True)
            cache, first = getattr(out, NAME), end
            pieces.append(out.logits)
        torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=2e-6)


def test_generates_the_tokens_that_follow_one_by_one(saved):
    folder, backbone, embedding = saved
    model = load_longcat(folder).eval()
    ids_BT = prompts()
    found = model.generate(ids_BT, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    sequence_BT = ids_BT
    for _ in range(12):
        following_B = expected_logits(backbone, embedding, sequence_BT)[:, -1].argmax(-1)
        sequence_BT = torch.cat([sequence_BT, following_B[:, None]], dim=1)
    assert torch.equal(found, sequence_BT)


def test_left_padding_gives_what_the_text_gives_alone(saved):
    folder, _, _ = saved
    model = load_longcat(folder).eval()
    ids_BT = prompts()
    padded_BT, mask_BT = ids_BT.clone(), torch.ones_like(ids_BT)
    padded_BT[0, :4], mask_BT[0, :4] = 3, 0
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    both = model.generate(padded_BT, attention_mask=mask_BT, **options)
    assert torch.equal(both[0, 4:], model.generate(ids_BT[:1, 4:], **options)[0])
    assert torch.equal(both[1], model.generate(ids_BT[1:], **options)[0])


def test_packed_documents_give_what_each_gives_alone(saved):
    folder, _, _ = saved
    model = load_longcat(folder).eval()
    ids_BT = prompts(batch=2)[1:]
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]), prepend=False)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]])
    with torch.no_grad():
        model(ids_BT, position_ids=positions, use_cache=False)
        model(ids_BT[:, :5], use_cache=False)
        model(ids_BT[:, 5:], use_cache=False)
    torch.testing.assert_close(seen[0], torch.cat(seen[1:], dim=1), rtol=0, atol=1e-6)


def test_bfloat16(saved):
    """Rounded once where the model's own code rounds after each table: near, not equal."""
    folder, backbone, embedding = saved
    expected = expected_logits(backbone, embedding, prompts())
    model = load_longcat(folder, dtype=torch.bfloat16).eval()
    assert model.engram.layers["0"].W_v.weight.dtype == torch.bfloat16
    with torch.no_grad():
        found = model(prompts()).logits.float()
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_what_does_not_fit_is_refused_and_changes_nothing(saved):
    folder, backbone, _ = saved
    held = load_file(folder / "ngrams.safetensors")
    wide = LlamaConfig(vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=1, num_attention_heads=2)
    other = LlamaForCausalLM(wide)
    with pytest.raises(ValueError, match=r"post_projs are \[24, 24\] side by side; expected \[48, 24\]"):
        attach_longcat_tables(other, folder)
    with pytest.raises(ValueError, match=r"tables of 50 token ids, and the model has 60"):
        attach_longcat_tables(LlamaForCausalLM(LlamaConfig(**wide.to_dict() | {"vocab_size": 60})), folder)
    assert attached_memory(other) is None
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = PROJECTIONS.format(5)
    index["weight_map"].pop(name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({key: held[key] for key in held if key != name}, folder / "ngrams.safetensors")
    with pytest.raises(ValueError, match=r"post_projs\.5\.weight isn't there"):
        attach_longcat_tables(backbone, folder)
    assert attached_memory(backbone) is None


def test_the_folder_of_another_model_is_refused(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json describes no n-gram embedding of LongCat-Flash-Lite"):
        load_longcat(tmp_path)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_layers_are_found_though_two_are_counted_for_each(num_layers):
    sizes = {**SIZES, "routed_scaling_factor": 6.0, "num_layers": num_layers}
    model = LongcatFlashForCausalLM(LongcatFlashConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, **sizes))
    assert decoder_layers(model) is model.model.layers


def test_changed_rows_lie_on_top_of_the_released_tables(saved):
    folder, _, _ = saved
    model = load_longcat(folder).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(VOCABULARY))
    held = (folder / "ngrams.safetensors").read_bytes()
    with torch.no_grad():
        before = model(prompts()).logits
    taught = teach(model, tokenizer, "ab", prompt="ba", steps=20)
    assert taught.losses[-1] < taught.losses[0]
    remove_overlay(model)
    with torch.no_grad():
        assert torch.equal(model(prompts()).logits, before)
    assert (folder / "ngrams.safetensors").read_bytes() == held


# --- trained as a variant of ours ---


def test_rows_and_projections_of_a_model_of_ours_train_and_come_back(tmp_path):
    """Before the first layer of a Llama: rows, projections and backbone learn; saved and loaded, the same logits."""
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, eos_token_id=EOS, **sizes))
    config = variant_config(
        "longcat_flash",
        table_size=3 * VOCABULARY,
        num_heads=2,
        ngram_orders=list(range(2, LARGEST + 1)),
        engram_dim=HIDDEN,
        pad_token_id=EOS,
        storage_path=str(tmp_path / "rows.dat"),
        shadow_map_path=str(tmp_path / "map.npy"),
    )
    attach_engram(model, config).train()
    before = model.engram.storage.gather(torch.arange(model.engram.storage.num_embeddings))
    ids_BT = prompts(length=24, batch=4)
    optimizers = torch.optim.AdamW(model.parameters(), lr=1e-2), RowAdam(model.engram.storage, lr=0.02)
    losses = []
    for _ in range(30):
        loss = model(ids_BT, labels=ids_BT).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    after = model.engram.storage.gather(torch.arange(len(before)))
    changed = set((before != after).any(dim=1).nonzero().flatten().tolist())
    row_ids = [slow_rows(ids_T) for ids_T in ids_BT.tolist()]
    seen = {row for row_ids_TH in row_ids for row_ids_H in row_ids_TH for row in row_ids_H}
    scored = {row for row_ids_TH in row_ids for row_ids_H in row_ids_TH[:-1] for row in row_ids_H}
    assert scored <= changed <= seen
    model.eval()
    with torch.no_grad():
        expected = model(ids_BT).logits
    save_pretrained(model, tmp_path / "saved")
    loaded = from_pretrained(tmp_path / "saved", mode="r").eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids_BT).logits, expected)


def test_converted_tables_are_trained_where_they_were_read(saved, tmp_path):
    folder, backbone, embedding = saved
    expected = expected_logits(backbone, embedding, prompts())
    done = import_table(folder, 0, tmp_path / "ours.dat")
    paths = {"storage_path": str(tmp_path / "ours.dat"), "shadow_map_path": str(tmp_path / "map.npy")}
    config = dataclasses.replace(released_config(json.loads((folder / "config.json").read_text())), **paths)
    attach_engram(backbone, config)
    backbone.engram.layers["0"].load_state_dict(load_file(done.fusion_path))
    with torch.no_grad():
        torch.testing.assert_close(backbone(prompts()).logits, expected, rtol=0, atol=1e-6)
    optimizer = RowAdam(backbone.train().engram.storage, lr=0.05)
    losses = []
    for _ in range(5):  # the rows alone
        loss = backbone(prompts(), labels=prompts()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
