"""Released tables in a model of one's own: rows only read, fusion layers trained; what doesn't belong is refused."""

import copy
import dataclasses

import pytest
import torch
from checkpoints import bits, deepseek_config, deepseek_rows, slow_deepseek_rows, write_checkpoint
from test_released_table import QWEN, qwen_config
from tiny import VOCABULARY, tiny_config, tiny_model, tiny_tokenizer
from transformers import TrainingArguments

from sense_v2.engram.hashing import NgramHasher
from sense_v2.engram.head_layout import HeadLayout
from sense_v2.engram.model import open_table
from sense_v2.engram.released.find_tables import released_config
from sense_v2.engram.released.released_table import open_released_table
from sense_v2.engram.tokenizer import EngramTokenizer, EngramTokenizerBuilder
from sense_v2.engram.variants import variant_config
from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.saving.save import save_pretrained
from sense_v2.hf.training.trainer import EngramTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*not checked:UserWarning")
IDS_BT = torch.tensor([[3, 9, 4, 4, 7, 12, 3, 9, 40], [21, 5, 6, 7, 33, 8, 21, 5, 6]])


@pytest.fixture
def released(tmp_path):
    """A checkpoint of two layers for the small tokenizer: folder, {layer: (codes, scales)}."""
    layout = HeadLayout.from_config(released_config(deepseek_config(5, [0, 0])))
    rows = {layer: deepseek_rows(layout.num_rows_L[place], seed=layer) for place, layer in enumerate((1, 14))}
    shards = {
        f"{layer}.safetensors": {
            f"layers.{layer}.engram.embed.weight": ("F8_E4M3", codes.shape, codes.tobytes()),
            f"layers.{layer}.engram.embed.scale": ("F8_E8M0", scales.shape, scales.tobytes()),
        }
        for layer, (codes, scales) in rows.items()
    }
    config = deepseek_config(5, list(layout.num_rows_L), engram_compressed_vocab_size=33, engram_pad_token_id=0)
    return write_checkpoint(tmp_path / "released", shards, config), rows


def attached(released, tmp_path, places, model=None):
    folder, _ = released
    tables = {place: open_released_table(folder, layer) for place, layer in places.items()}
    config = dataclasses.replace(next(iter(tables.values())).config, shadow_map_path=str(tmp_path / "map.npy"))
    return attach_engram(model or tiny_model("llama"), config, tiny_tokenizer(), storage=tables), tables


def awake(model):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in model.engram:
            layer.W_v.weight.normal_(0, 0.02, generator=generator)
            if layer.conv is not None:
                layer.conv.weight.normal_(0, 0.3, generator=generator)


def test_each_layer_looks_up_its_own_tables_rows(released, tmp_path):
    """Layer 14's table before layer 2 of a model of three: its row ids, and its rows as torch decodes them."""
    _, rows = released
    model = tiny_model("llama")
    expected = model(IDS_BT).logits
    attached(released, tmp_path, {1: 1, 2: 14}, model)
    assert torch.equal(model(IDS_BT).logits, expected)  # a fresh layer is the identity
    seen = {}
    for place, layer in ((1, 1), (2, 14)):
        fusion = model.engram.layers[str(place)]
        fusion.W_k.register_forward_pre_hook(lambda _, args, layer=layer: seen.setdefault(layer, args[0]))
        assert (fusion.layer_id, fusion.hasher.layer_id) == (place, layer)
    awake(model)
    assert not torch.allclose(model(IDS_BT).logits, expected)
    for layer, (codes, scales) in rows.items():
        hasher = NgramHasher(
            "deepseek_v41",
            layer_id=layer,
            layer_ids=[1, 14],
            ngram_orders=[2, 3, 4],
            num_heads=8,
            table_size=5,
            compressed_vocab_size=33,
            pad_id=0,
        )
        compressed_BT = torch.where(IDS_BT == 0, 0, (IDS_BT - 1) // 3 + 1)
        ids_BTH = hasher(compressed_BT)
        values = slow_deepseek_rows(codes[ids_BTH.numpy()], scales[ids_BTH.numpy()])
        assert torch.equal(seen[layer], values.flatten(-2).float())


def test_generation_with_a_cache_equals_the_full_forward(released, tmp_path):
    model, _ = attached(released, tmp_path, {1: 1, 2: 14}, tiny_model("llama", initializer_range=0.2))
    awake(model)
    model.generation_config.eos_token_id = None
    tokens = model.generate(IDS_BT, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(IDS_BT))
    for step in range(6):
        whole = model(tokens[:, : IDS_BT.shape[1] + step], use_cache=False).logits[:, -1].argmax(-1)
        assert torch.equal(tokens[:, IDS_BT.shape[1] + step], whole)
    again = copy.deepcopy(model)
    assert torch.equal(again(IDS_BT).logits, model(IDS_BT).logits)


@pytest.mark.parametrize("places", [{1: 14}, {0: 1, 2: 14}])
def test_the_fusion_is_trained_and_no_row_changes(released, tmp_path, places):
    folder, _ = released
    before = {path: path.read_bytes() for path in folder.iterdir()}
    model, tables = attached(released, tmp_path, places)
    model.train()
    if len(places) == 1:
        assert model.engram.storage is tables[1]
        assert not model.engram.storage.rows_require_grad
    else:
        with pytest.raises(AttributeError, match=r"has a table for each of its layers, 0, 2"):
            model.engram.storage  # noqa: B018
    optimizers = [torch.optim.AdamW(model.engram.parameters(), lr=0.01)]  # no rows to train
    losses = []
    for _ in range(8):
        loss = model(IDS_BT, labels=IDS_BT).loss
        loss.backward()
        losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    assert all(fusion.W_v.weight.any() for fusion in model.engram)
    model.engram.prefetch(IDS_BT)
    bare = tiny_model("llama")
    detach_engram(model)
    assert torch.equal(model.eval()(IDS_BT).logits, bare(IDS_BT).logits)
    assert next(iter(tables.values()))(torch.tensor([0])).shape == (1, 256)  # who opened a table closes it
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_transformers_trainer_trains_the_fusion_and_resumes(released, tmp_path):
    def trainer(max_steps):
        model, _ = attached(released, tmp_path, {1: 14})
        settings = {
            "save_steps": 2,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "lr_scheduler_type": "constant",
        }
        arguments = TrainingArguments(str(tmp_path / "out"), max_steps=max_steps, learning_rate=1e-3, **settings)
        data = [{"input_ids": row, "labels": row} for row in IDS_BT]
        return EngramTrainer(model=model, args=arguments, train_dataset=data)

    trainer(2).train()
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=True)
    whole = trainer(4)
    whole.args.output_dir = str(tmp_path / "whole")
    whole.train()
    for one, other in zip(resumed.model.engram.parameters(), whole.model.engram.parameters(), strict=True):
        assert torch.equal(one, other)
    assert resumed.model.engram.layers["1"].W_v.weight.any()
    assert not list((tmp_path / "out/checkpoint-4/engram").glob("*.dat"))


def test_qwens_table_takes_token_ids_as_they_are(tmp_path):
    config = qwen_config(vocab_size=VOCABULARY, eos_token_id=2)
    num_rows = HeadLayout.from_config(released_config(config)).num_rows_L[0]
    values = torch.randn(num_rows, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    shards = {"a.safetensors": {f"{QWEN}.weight": ("BF16", tuple(values.shape), bits(values))}}
    table = open_released_table(write_checkpoint(tmp_path / "qwen", shards, config), 1)
    settings = dataclasses.replace(table.config, num_streams=1, shadow_map_path=str(tmp_path / "identity.npy"))
    model = attach_engram(tiny_model("llama"), settings, storage=table)
    tokenizer = model.engram.tokenizer
    assert torch.equal(tokenizer(IDS_BT), IDS_BT)
    assert tokenizer.compressed_vocab_size == VOCABULARY
    awake(model)
    seen = []
    model.engram.layers["1"].W_k.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(IDS_BT)
    hasher = NgramHasher(
        "qwen_ple",
        layer_id=1,
        layer_ids=[1],
        ngram_orders=[2, 3],
        num_heads=2,
        table_size=50,
        compressed_vocab_size=VOCABULARY,
        pad_id=2,
        seed=1234,
    )
    assert torch.equal(seen[0], values[hasher(IDS_BT)].flatten(-2).float())


def test_a_new_table_of_qwens_layout_takes_token_ids_as_they_are_too(tmp_path):
    settings = {"table_size": 50, "engram_dim": 64, "num_heads": 2, "pad_token_id": 2}
    config = variant_config("qwen_ple", storage_path=str(tmp_path / "t.dat"), **settings)
    config.shadow_map_path = str(tmp_path / "map.npy")
    model = attach_engram(tiny_model("llama"), config, tiny_tokenizer())
    assert torch.equal(model.engram.tokenizer(IDS_BT), IDS_BT)
    assert model.engram.layers["1"].hasher.compressed_vocab_size == VOCABULARY
    provenance = model.engram.storage.manifest.provenance
    assert (provenance["layer"], provenance["compressed_vocab_size"]) == (1, VOCABULARY)
    detach_engram(model)
    EngramTokenizerBuilder(tiny_tokenizer()).build_mapping(tmp_path / "folded.npy")
    config.shadow_map_path = str(tmp_path / "folded.npy")
    with pytest.raises(ValueError, match="folds token ids"):
        attach_engram(tiny_model("llama"), config, tiny_tokenizer())


def test_a_table_of_ours_that_is_open_already(tmp_path):
    """One layer of the published layout, and the rows trained."""
    EngramTokenizerBuilder(tiny_tokenizer(), normalization="deepseek").build_mapping(tmp_path / "map.npy")
    settings = {"table_size": 5, "engram_dim": 24 * 8, "layer_indices": [1], "pad_token_id": 0}
    config = variant_config("deepseek_v41", storage_path=str(tmp_path / "t.dat"), **settings)
    config.shadow_map_path = str(tmp_path / "map.npy")
    table = open_table(config, EngramTokenizer(tmp_path / "map.npy"))
    model = attach_engram(tiny_model("llama"), config, storage=table).train()
    awake(model)
    model(IDS_BT, labels=IDS_BT).loss.backward()
    ids_U, _ = table.gradients()
    table.write(ids_U, torch.zeros(len(ids_U), 8))
    detach_engram(model)
    assert table.manifest.generation == 1
    table.close()


def test_what_does_not_belong_together_is_refused_and_leaves_the_model(released, tmp_path):
    folder, _ = released
    table = open_released_table(folder, 14)
    config = dataclasses.replace(table.config, shadow_map_path=str(tmp_path / "map.npy"))
    model = tiny_model("llama")

    def refused(match, storage={2: table}, tokenizer=tiny_tokenizer(), **changes):  # noqa: B006, B008
        with pytest.raises(ValueError, match=match):
            attach_engram(model, dataclasses.replace(config, **changes), tokenizer, storage=storage)
        assert not hasattr(model, "engram")

    refused(r"num_streams = 4, and LlamaForCausalLM has one residual stream; .*num_streams=1", num_streams=4)
    refused(r"storage holds 14, but this LlamaForCausalLM has 3 layers", storage=table)
    refused(r"storage holds 7, but", storage={7: table})
    refused("at least one layer", storage={})
    refused(r"of layer 14, and the configuration has memory in layers \[1\]", layer_indices=[1])
    refused("of variant 'deepseek_v41', EngramConfig.variant = 'paper'", storage=table, variant="paper")
    refused("the layout of its heads isn't that of the configuration", table_size=6)
    refused("rows of 256 values; EngramConfig.engram_dim = 768 makes 32", engram_dim=24 * 32)
    refused("its hash has seed 0, EngramConfig.seed = 3", seed=3)
    other = dataclasses.replace(tiny_config(tmp_path), variant="sense")
    with pytest.raises(ValueError, match="has one table for all layers; pass storage=table"):
        attach_engram(model, other, tiny_tokenizer(), storage={1: table})
    small = tiny_tokenizer(VOCABULARY - 3)
    refused(
        r"its rows are of 33 compressed ids, and the map of None has 32",
        tokenizer=small,
        shadow_map_path=str(tmp_path / "small.npy"),
    )


def test_a_map_of_another_revision_is_refused(released, tmp_path):
    """Of the same size, with other tokens in one class."""
    folder, _ = released
    EngramTokenizerBuilder(tiny_tokenizer(), normalization="deepseek").build_mapping(tmp_path / "right.npy")
    right = EngramTokenizer(tmp_path / "right.npy")
    table = open_released_table(folder, 14, tokenizer=right)
    other = tiny_tokenizer()
    vocabulary = {
        ("Word1" if token == "word2" else "word2" if token == "Word1" else token): i
        for token, i in other.get_vocab().items()
    }
    other = type(other)(type(other.model)(vocabulary, unk_token="<pad>"))
    config = dataclasses.replace(table.config, shadow_map_path=str(tmp_path / "other.npy"))
    with pytest.raises(
        ValueError, match=r"its rows are of the map with SHA-256 .*: another tokenizer, or another rev"
    ):
        attach_engram(tiny_model("llama"), config, other, storage={2: table})


def test_it_is_not_saved_with_rows_that_are_somebody_elses(released, tmp_path):
    for places in ({1: 1}, {1: 1, 2: 14}):
        model, _ = attached(released, tmp_path, places)
        with pytest.raises(
            ValueError, match=r"reads tables of a released checkpoint.*model\.engram\.layers\.state_dict"
        ):
            save_pretrained(model, tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
