"""A frozen backbone that is named in place of a copy: opened again, and refused where it is another one."""

import shutil

import pytest
import torch
from test_save import logits, with_memory
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from sense_v2.hf.attach import detach_engram
from sense_v2.hf.load import from_pretrained
from sense_v2.hf.saving.backbone_facts import backbone_reference
from sense_v2.hf.saving.save import save_pretrained


def plain_folder(tmp_path, name="llama"):
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def opened_plain(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model, backbone_reference(model)


def test_a_backbone_is_named_in_place_of_a_copy(tmp_path):
    model, reference = opened_plain(plain_folder(tmp_path))
    with_memory(tmp_path / "memory", model=model)
    save_pretrained(model, tmp_path / "saved", tokenizer=tiny_tokenizer(), backbone=reference)
    assert not list((tmp_path / "saved").glob("model*"))
    expected = logits(model)
    for again in (
        from_pretrained(tmp_path / "saved"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved"),
        from_pretrained(tmp_path / "saved", backbone=tiny_model("llama")),
    ):
        assert torch.equal(logits(again), expected)
    assert torch.equal(logits(detach_engram(again)), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")))


def test_a_named_backbone_may_be_saved_as_a_copy_later_and_the_other_way(tmp_path):
    model, reference = opened_plain(plain_folder(tmp_path))
    with_memory(tmp_path / "memory", model=model)
    for way in (reference, None, reference):
        save_pretrained(model, tmp_path / "saved", backbone=way)
        assert bool(list((tmp_path / "saved").glob("model*"))) == (way is None)
        assert torch.equal(logits(from_pretrained(tmp_path / "saved")), logits(model))


def test_a_backbone_that_was_trained_is_not_named(tmp_path):
    model, reference = opened_plain(plain_folder(tmp_path))
    with_memory(tmp_path / "memory", model=model)
    with torch.no_grad():
        model.model.norm.weight.add_(0.5)
    with pytest.raises(ValueError, match=r"weights.*changed since.*plain.*leave backbone= out"):
        save_pretrained(model, tmp_path / "saved", backbone=reference)
    assert not (tmp_path / "saved" / "engram").exists()


@pytest.mark.parametrize("fate", ["changed", "gone"])
def test_a_named_backbone_that_is_another_by_now_is_refused(tmp_path, fate):
    plain = plain_folder(tmp_path)
    model, reference = opened_plain(plain)
    with_memory(tmp_path / "memory", model=model)
    save_pretrained(model, tmp_path / "saved", backbone=reference)
    if fate == "changed":
        torch.manual_seed(5)
        tiny_model("llama", hidden=32).apply(
            lambda part: [torch.nn.init.normal_(p) for p in part.parameters(False)]
        ).save_pretrained(plain)
    else:
        shutil.rmtree(plain)
    error, what = (ValueError, "other weights") if fate == "changed" else (FileNotFoundError, "isn't there")
    with pytest.raises(error, match=rf"plain.*{what}.*backbone="):
        from_pretrained(tmp_path / "saved")


def test_a_model_that_came_from_nowhere_has_no_name(tmp_path):
    with pytest.raises(ValueError, match="was read from no folder"):
        backbone_reference(tiny_model("llama"))


def test_a_named_backbone_opens_in_another_type(tmp_path):
    model, reference = opened_plain(plain_folder(tmp_path))
    with_memory(tmp_path / "memory", model=model)
    save_pretrained(model, tmp_path / "saved", backbone=reference)
    for dtype in (torch.bfloat16, "bfloat16"):
        assert from_pretrained(tmp_path / "saved", dtype=dtype).dtype == torch.bfloat16


def test_weights_that_nothing_identifies_have_no_name(tmp_path):
    model, _ = opened_plain(plain_folder(tmp_path))
    model.hf_quantizer = object()  # as a quantized model has
    with pytest.raises(ValueError, match=r"quantized.*save it with them"):
        backbone_reference(model)
