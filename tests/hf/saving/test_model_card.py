"""The front of a model card: what the hub reads, taken from what is known of the backbone and the training."""

import pytest
import torch
from huggingface_hub import ModelCard
from test_save import with_memory
from tiny import tiny_model

from sense_v2.hf.saving.save import save_pretrained


def front(folder):
    return ModelCard.load(folder / "README.md").data.to_dict()


def parent(folder, card):
    """A model in a folder of this machine, with a card or without."""
    tiny_model("llama").save_pretrained(folder)
    if card is not None:
        (folder / "README.md").write_text(f"---\n{card}\n---\n\n# Parent\n")
    return type(tiny_model("llama")).from_pretrained(folder, dtype=torch.float32)


def saved(folder, model, **training):
    with_memory(folder / "memory", model=model)
    save_pretrained(model, folder / "saved", training=training)
    return front(folder / "saved")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "memory").mkdir()
    return tmp_path


def test_a_backbone_in_a_folder_hands_on_its_license_and_where_it_came_from(folder):
    card = "license: other\nlicense_name: llama3\nlicense_link: LICENSE\nbase_model: someone/parent\nlanguage: en"
    found = saved(folder, parent(folder / "parent", card))
    assert found["base_model"] == "someone/parent"
    assert (found["license"], found["license_name"]) == ("other", "llama3")
    assert found["language"] == "en"
    assert found["tags"] == ["engram", "sense-v2"]
    assert str(folder) not in str(found)


def test_a_folder_of_the_hubs_cache_is_named_as_on_the_hub(folder):
    path = folder / "hub" / "models--someone--thing" / "snapshots" / "abc"
    found = saved(folder, parent(path, "license: mit\nbase_model: someone/older"))
    assert (found["base_model"], found["license"]) == ("someone/thing", "mit")


@pytest.mark.parametrize("card", [None, "license: [1", "- a list"])
def test_without_a_card_that_can_be_read_nothing_is_claimed(folder, card):
    found = saved(folder, parent(folder / "parent", card))
    assert not {"license", "base_model", "datasets"} & set(found)


def test_a_dataset_of_the_hub_is_named_and_a_folder_is_not(folder):
    model = with_memory(folder / "memory")
    save_pretrained(model, folder / "hub_data", training={"corpus": "someone/texts:en"})
    assert front(folder / "hub_data")["datasets"] == ["someone/texts"]
    save_pretrained(model, folder / "own_data", training={"corpus": "my_texts"})
    assert "datasets" not in front(folder / "own_data")
