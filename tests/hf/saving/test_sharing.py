"""Saved folders in other hands: the table by reference, another backbone, the Auto classes, a pipeline, the hub."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, RepoUrl
from test_save import ids, in_place, logits, with_memory
from tiny import tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    LlamaForCausalLM,
    pipeline,
)

from sense_v2.engram.delta.delta_file import read_delta
from sense_v2.engram.table import disk, platform
from sense_v2.hf import from_pretrained, push_to_hub, save_pretrained
from sense_v2.hf.attach import detach_engram
from sense_v2.hf.memory import attached_memory, memory_of
from sense_v2.hf.saving.backbone_facts import backbone_reference

ROOT = Path(__file__).parents[3]


def renamed_tokenizer() -> Tokenizer:
    """As many tokens as the tiny one, of which as many share a compressed id, with other texts."""
    words = ["<pad>"]
    for number in range(96):
        words += [f"term{number}", f"Term{number}", f"TERM{number}"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words[:96])}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


# --- the table: copied, shared, or named ---


def test_a_table_by_reference(tmp_path):
    model = with_memory(tmp_path / "table")
    save_pretrained(model, tmp_path / "saved", table="reference")
    assert not (tmp_path / "saved" / "engram" / "engram_table.dat").exists()
    named = json.loads((tmp_path / "saved" / "engram" / "table_reference.json").read_text())
    assert named["storage_path"] == str(tmp_path / "table" / "engram_table.dat")
    assert named["commit"] == json.loads((tmp_path / "table" / "engram_table.json").read_text())["commit"]
    loaded = from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))
    assert memory_of(loaded).storage.path == tmp_path / "table" / "engram_table.dat"


def test_a_referenced_table_that_has_gone_on_is_refused(tmp_path):
    model = with_memory(tmp_path / "table")
    save_pretrained(model, tmp_path / "saved", table="reference")
    memory_of(model).storage.write(torch.tensor([3]), torch.ones(1, 8))
    memory_of(model).storage.commit(step=7)
    with pytest.raises(
        ValueError, match=r"table_reference\.json names .*\(commit [0-9a-f]{16}\)\. .*gone on .*step 7"
    ):
        from_pretrained(tmp_path / "saved")
    save_pretrained(model, tmp_path / "saved", table="reference")
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), logits(model))


def test_a_referenced_table_that_is_gone(tmp_path):
    model = with_memory(tmp_path / "table")
    save_pretrained(model, tmp_path / "saved", table="reference")
    (tmp_path / "table").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"engram_table\.dat: the table that .* names isn't there.*'copy'"):
        from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("text", ["{", "[]", '{"commit": 3, "storage_path": "x"}', '{"commit": "x"}'])
def test_a_damaged_reference(tmp_path, text):
    save_pretrained(with_memory(tmp_path / "table"), tmp_path / "saved", table="reference")
    (tmp_path / "saved" / "engram" / "table_reference.json").write_text(text)
    with pytest.raises(ValueError, match=r"table_reference\.json is no reference"):
        from_pretrained(tmp_path / "saved")


def test_from_reference_to_copy_and_back(tmp_path):
    model = with_memory(tmp_path / "table")
    for table in ("reference", "copy"):
        save_pretrained(model, tmp_path / "saved", table=table)
        assert torch.equal(logits(from_pretrained(tmp_path / "saved")), logits(model))
    assert not (tmp_path / "saved" / "engram" / "table_reference.json").exists()
    with pytest.raises(FileExistsError, match=r"a reference would leave it without a use"):
        save_pretrained(model, tmp_path / "saved", table="reference")
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), logits(model))


def test_a_table_in_place_is_no_reference_to_itself(tmp_path):
    model = in_place(tmp_path)
    save_pretrained(model, tmp_path, table="reference")
    assert not (tmp_path / "engram" / "table_reference.json").exists()
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(model))


def test_reflinks_are_made_or_refused(tmp_path, monkeypatch):
    model = with_memory(tmp_path / "table")
    cloned = []

    def clone(source_fd: int, fd: int) -> bool:
        cloned.append(fd)
        return bool(disk.write_at(fd, disk.os.pread(source_fd, 10**6, 0), 0) or True)

    monkeypatch.setattr(platform, "reflink", clone)
    save_pretrained(model, tmp_path / "shared", table="reflink")
    assert cloned
    assert torch.equal(logits(from_pretrained(tmp_path / "shared")), logits(model))
    monkeypatch.setattr(platform, "reflink", lambda source_fd, fd: False)
    with pytest.raises(OSError, match=r"can't be shared with it as a reflink.*Use a copy") as refused:
        save_pretrained(model, tmp_path / "refused", table="reflink")
    assert refused.value.errno == errno.EOPNOTSUPP
    save_pretrained(model, tmp_path / "copied")
    assert torch.equal(logits(from_pretrained(tmp_path / "copied")), logits(model))


def test_an_unknown_way_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"table = 'link': must be one of copy, reflink, reference"):
        save_pretrained(with_memory(tmp_path / "table"), tmp_path / "saved", table="link")


# --- what differs ---


@pytest.fixture
def saved(tmp_path) -> Path:
    save_pretrained(with_memory(tmp_path / "table"), tmp_path / "saved", tokenizer=tiny_tokenizer())
    return tmp_path / "saved"


def test_the_saved_backbone_and_tokenizer_are_no_news(saved, recwarn):
    from_pretrained(saved, tokenizer=tiny_tokenizer())
    from_pretrained(saved, backbone=tiny_model("llama"))
    from_pretrained(saved, dtype=torch.bfloat16)
    assert [str(one.message) for one in recwarn if "sense" in str(one.filename)] == []


def test_another_backbone_that_may_work(saved):
    torch.manual_seed(1)
    backbone = LlamaForCausalLM(tiny_model("llama").config)
    with pytest.warns(UserWarning, match=r"trained on another backbone: weights was \w{16}, is \w{16}\. "):
        model = from_pretrained(saved, backbone=backbone)
    assert model is backbone
    assert attached_memory(model) is not None
    with pytest.warns(
        UserWarning,
        match=r"model_type was llama, is qwen3; architecture was LlamaForCausalLM, is Qwen3ForCausalLM; "
        r"num_hidden_layers was 3, is 2; vocab_size was 96, is 128",
    ):
        from_pretrained(saved, backbone=tiny_model("qwen3", layers=2, vocabulary=128))


def test_another_backbone_that_cannot_work(saved):
    with pytest.raises(ValueError, match=r"another backbone: hidden_size was 32, is 64; weights was"):
        from_pretrained(saved, backbone=tiny_model("llama", hidden=64))
    with pytest.raises(ValueError, match=r"has 1 layers"), pytest.warns(UserWarning, match=r"num_hidden_layers"):
        from_pretrained(saved, backbone=tiny_model("llama", layers=1))
    with pytest.raises(ValueError, match=r"has memory attached already"):
        from_pretrained(saved, backbone=from_pretrained(saved))


def test_weights_that_were_replaced_in_the_folder(saved):
    torch.manual_seed(1)
    LlamaForCausalLM(tiny_model("llama").config).save_pretrained(saved)
    with pytest.warns(UserWarning, match=r"another backbone: weights was"):
        from_pretrained(saved)


@pytest.mark.parametrize("package", ["transformers", "sense_v2"])
def test_another_version(saved, package):
    path = saved / "engram" / "backbone.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, package: "5.1.0"}))
    with pytest.warns(UserWarning, match=rf"was saved with {package} 5\.1\.0, this is "):
        from_pretrained(saved)
    path.write_text(json.dumps({**facts, package: f"{'.'.join(facts[package].split('.')[:2])}.99"}))
    from_pretrained(saved)  # a patch release is no news


def test_a_folder_of_an_earlier_version_says_nothing_of_its_backbone(saved):
    (saved / "engram" / "backbone.json").unlink()
    from_pretrained(saved, backbone=tiny_model("llama"))


def test_another_tokenizer(saved):
    with pytest.raises(ValueError, match=r"a tokenizer of 96 token ids, .* has 90; use the tokenizer that was saved"):
        from_pretrained(saved, tokenizer=tiny_tokenizer(90))
    words = {f"only{i}": i for i in range(96)}
    with pytest.raises(
        ValueError, match=r"another tokenizer .*: 94 of 96 token ids .* the first is 2 \('only2': 1, now 2\)"
    ):
        from_pretrained(saved, tokenizer=Tokenizer(models.WordLevel(words, unk_token="only0")))
    with pytest.warns(UserWarning, match=r"its tokens have other texts"):
        from_pretrained(saved, tokenizer=renamed_tokenizer())


def test_a_tokenizer_that_was_replaced_in_the_folder(saved):
    words = {f"only{i}": i for i in range(96)}
    Tokenizer(models.WordLevel(words, unk_token="only0")).save(str(saved / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"94 of 96 token ids"):
        from_pretrained(saved)


# --- no code of others ---


def test_pickles_are_neither_read_nor_downloaded(saved, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was read"))
    from_pretrained(saved)
    AutoModelForCausalLM.from_pretrained(saved)
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    for opening in (from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(OSError, match=r"model\.safetensors"):
            opening(saved)
    with pytest.raises(ValueError, match=r"only safetensors are read"):
        from_pretrained(saved, use_safetensors=False)


def test_code_in_a_folder_stays_unread(saved):
    config = json.loads((saved / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "evil.py").write_text("raise SystemExit('the code of the folder ran')")
    assert type(AutoModelForCausalLM.from_pretrained(saved)) is LlamaForCausalLM
    assert type(from_pretrained(saved)) is LlamaForCausalLM


# --- the Auto classes ---


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "qwen3_next"])
def test_the_auto_class_opens_it_with_memory(tmp_path, name):
    model = with_memory(tmp_path / "table", name)
    save_pretrained(model, tmp_path / "saved")
    opened, report = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values()), report
    assert type(opened) is type(model)
    assert torch.equal(logits(opened), logits(model))
    assert memory_of(opened).storage.mode == "r"
    assert opened.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}
    out = opened.generate(ids()[:, :4], max_new_tokens=5, do_sample=False)
    assert torch.equal(out, model.generate(ids()[:, :4], max_new_tokens=5, do_sample=False))


def test_an_encoder_is_no_causal_model(tmp_path):
    model = with_memory(tmp_path / "table", "bert")
    save_pretrained(model, tmp_path / "saved")
    assert torch.equal(logits(AutoModelForMaskedLM.from_pretrained(tmp_path / "saved")), logits(model))


def test_what_the_auto_class_is_told_reaches_the_backbone(saved):
    opened = AutoModelForCausalLM.from_pretrained(
        saved, dtype=torch.bfloat16, attn_implementation="eager", use_cache=False, mode="r+"
    )
    assert opened.dtype is torch.bfloat16
    assert memory_of(opened).layers["1"].W_v.weight.dtype is torch.bfloat16
    assert opened.config._attn_implementation == "eager"
    assert opened.config.use_cache is False
    assert memory_of(opened).storage.mode == "r+"


def test_a_configuration_alone_makes_no_model(saved):
    config = AutoConfig.from_pretrained(saved)
    assert config.model_type == "sense_engram"
    with pytest.raises(ValueError, match=r"isn't made from a configuration alone"):
        AutoModelForCausalLM.from_config(config)
    config.save_pretrained(saved)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(saved)), logits(from_pretrained(saved)))


def test_without_sense_v2_it_is_refused_and_not_opened_without_memory(saved):
    code = f"""
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({str(saved)!r})
except (ValueError, KeyError) as error:
    assert "sense_engram" in str(error), error
else:
    raise SystemExit("it opened")
import sense_v2.hf
assert AutoModelForCausalLM.from_pretrained({str(saved)!r}).engram is not None
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_another_kind_of_model_class_says_so(tmp_path):
    class Own(LlamaForCausalLM):
        pass

    model = with_memory(tmp_path / "table", model=Own(tiny_model("llama").config))
    with pytest.warns(UserWarning, match=r"Own is none of transformers' own models"):
        save_pretrained(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "llama"
    with pytest.warns(UserWarning, match=r"architecture was Own, is LlamaForCausalLM"):
        assert torch.equal(logits(from_pretrained(tmp_path / "saved")), logits(model))


def test_a_pipeline(saved):
    model, text = from_pretrained(saved), "word1 WORD2 word3"
    expected = model.generate(torch.tensor([tiny_tokenizer().encode(text).ids]), max_new_tokens=6, do_sample=False)
    write = pipeline("text-generation", model=str(saved))
    assert attached_memory(write.model) is not None
    (found,) = write(text, max_new_tokens=6, do_sample=False, return_tensors=True)
    assert found["generated_token_ids"] == expected[0].tolist()
    bare = detach_engram(model).generate(
        torch.tensor([tiny_tokenizer().encode(text).ids]), max_new_tokens=6, do_sample=False
    )
    assert not torch.equal(bare, expected)  # or the test would show nothing


def test_the_tokenizer_is_found_beside_it(saved):
    text = "word1 WORD2 word3"
    assert AutoTokenizer.from_pretrained(saved)(text)["input_ids"] == tiny_tokenizer().encode(text).ids


# --- the card ---


def test_the_card_says_what_was_given(tmp_path):
    model = with_memory(tmp_path / "table")
    memory_of(model).storage.commit(step=40)
    save_pretrained(
        model,
        tmp_path / "my model",
        training={"steps": 40, "corpus": "a|b", "left out": None},
        evaluation={"perplexity": 12.34567},
    )
    card = (tmp_path / "my model" / "README.md").read_text()
    for line in (
        "# my model",
        "| steps | 40 |",
        "| corpus | a\\|b |",
        "| perplexity | 12.35 |",
        f"| rows | {memory_of(model).storage.num_embeddings:,} |",
        "| row width | 8 |",
        "| step of the last commit | 40 |",
        "import sense_v2.hf  # makes transformers know models with memory",
    ):
        assert line in card.splitlines(), card
    assert "left out" not in card
    assert "base_model" not in card  # this one came from nowhere


def test_a_card_that_somebody_wrote_stays(tmp_path):
    model = with_memory(tmp_path / "table")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "README.md").write_text("mine")
    save_pretrained(model, tmp_path / "saved")
    assert (tmp_path / "saved" / "README.md").read_text() == "mine"
    (tmp_path / "saved" / "README.md").unlink()
    save_pretrained(model, tmp_path / "saved")
    save_pretrained(model, tmp_path / "saved", training={"steps": 3})
    assert "| steps | 3 |" in (tmp_path / "saved" / "README.md").read_text()


def test_a_facts_file_that_is_damaged(saved):
    (saved / "engram" / "backbone.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"backbone\.json: expected a JSON object, found list"):
        from_pretrained(saved)


# --- the hub ---


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """What is uploaded becomes the cache that huggingface_hub keeps of a repository, links to blobs and all, and is
    found there by huggingface_hub itself."""
    cache = tmp_path / "cache"
    commit = "0123456789abcdef0123456789abcdef01234567"

    def upload_folder(self, *, repo_id, folder_path, revision=None, **more):
        repo = cache / f"models--{repo_id.replace('/', '--')}"
        for number, path in enumerate(sorted(Path(folder_path).rglob("*"))):
            if path.is_file():
                blob, link = (
                    repo / "blobs" / f"{number:040x}",
                    repo / "snapshots" / commit / path.relative_to(folder_path),
                )
                blob.parent.mkdir(parents=True, exist_ok=True)
                link.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, blob)
                blob.chmod(0o444)
                link.symlink_to(blob)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(commit)
        return commit

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, repo_id, **more: RepoUrl(f"https://huggingface.co/{repo_id}")
    )
    return cache


def test_to_the_hub_and_back(tmp_path, hub):
    model = in_place(tmp_path / "saved")
    memory_of(model).storage.open_state("adagrad", 1)  # which isn't for others
    memory_of(model).storage.write(torch.tensor([3]), torch.ones(1, 8))
    save_pretrained(model, tmp_path / "saved", tokenizer=tiny_tokenizer())
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    (tmp_path / "saved" / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "saved" / "engram" / "secret.pkl").write_bytes(b"")
    push_to_hub(tmp_path / "saved", "someone/model")
    uploaded = {
        str(path.relative_to(hub)).split("/", 3)[3] for path in hub.glob("*/snapshots/**/*") if path.is_file()
    }
    assert uploaded == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "engram/backbone.json",
        "engram/config.json",
        "engram/engram_table.dat",
        "engram/engram_table.json",
        "engram/fusion.safetensors",
        "engram/shadow_map.json",
        "engram/shadow_map.npy",
    }
    options = {"cache_dir": hub, "local_files_only": True}
    for opening in (from_pretrained, AutoModelForCausalLM.from_pretrained):
        assert torch.equal(logits(opening("someone/model", **options)), logits(model))
    with pytest.raises(ValueError, match=r"its rows would be trained in the hub's cache"):
        from_pretrained("someone/model", mode="r+", **options)


def test_an_overlay_goes_to_the_hub_without_its_optimizer_states_and_lies_on_a_model_from_there(tmp_path, hub):
    model = in_place(tmp_path / "saved")
    memory_of(model).storage.flush()
    save_pretrained(model, tmp_path / "saved")
    detach_engram(model)
    model = from_pretrained(tmp_path / "saved", overlay=tmp_path / "facts.safetensors", mode="r+")
    overlay = memory_of(model).storage
    overlay.open_state("adagrad", 1)
    overlay.write(torch.arange(0, 1_500, 2), torch.ones(750, 8))
    overlay.commit()
    changed = logits(model.eval())
    push_to_hub(tmp_path / "saved", "someone/plain")
    options = {"cache_dir": hub, "local_files_only": True}
    detach_engram(model)
    assert torch.equal(
        logits(from_pretrained("someone/plain", overlay=tmp_path / "facts.safetensors", mode="r+", **options)),
        changed,
    )
    shutil.copy(tmp_path / "facts.safetensors", tmp_path / "saved" / "engram" / "overlay.safetensors")
    push_to_hub(tmp_path / "saved", "someone/changed")
    assert torch.equal(logits(from_pretrained("someone/changed", **options)), changed)
    (uploaded,) = hub.glob("*changed/snapshots/*/engram/overlay.safetensors")
    assert read_delta(uploaded).states == {}


def test_a_name_that_the_hub_does_not_have(hub):
    with pytest.raises(
        FileNotFoundError, match=r"no-one/nothing: there is no such folder, and no model of that name"
    ):
        from_pretrained("no-one/nothing", cache_dir=hub, local_files_only=True)
    with pytest.raises(FileNotFoundError, match=r"no model there"):
        from_pretrained(Path("no-one/nothing"))


def test_what_is_not_pushed(tmp_path, hub):
    model = with_memory(tmp_path / "table")
    save_pretrained(model, tmp_path / "named", table="reference")
    with pytest.raises(ValueError, match=r"by reference, which nobody else can follow; save .* table='copy'"):
        push_to_hub(tmp_path / "named", "someone/model")
    with pytest.raises(FileNotFoundError, match=r"no model there"):
        push_to_hub(tmp_path, "someone/model")
    trained = in_place(tmp_path / "saved")
    save_pretrained(trained, tmp_path / "saved")
    memory_of(trained).storage.write(torch.tensor([3]), torch.ones(1, 8))
    with pytest.raises(ValueError, match=r"engram_table\.journal: somebody trains"):
        push_to_hub(tmp_path / "saved", "someone/model")
    memory_of(trained).storage.flush()
    (tmp_path / "saved" / "engram" / "fusion.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks fusion\.safetensors: it was not saved to its end"):
        push_to_hub(tmp_path / "saved", "someone/model")
    assert not hub.exists()


def test_a_model_without_memory_is_pushed_too(tmp_path, hub):
    save_pretrained(tiny_model("llama"), tmp_path / "saved")
    push_to_hub(tmp_path / "saved", "someone/model")
    assert attached_memory(from_pretrained("someone/model", cache_dir=hub, local_files_only=True)) is None


def test_a_backbone_of_this_machine_alone_is_not_pushed(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    reference = backbone_reference(model)
    with_memory(tmp_path / "table", model=model)
    save_pretrained(model, tmp_path / "saved", backbone=reference)
    with pytest.raises(ValueError, match=r"names its backbone, .*plain, which nobody else can follow"):
        push_to_hub(tmp_path / "saved", "me/model")
