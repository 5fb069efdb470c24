"""Commands of docs/recipes.md, with a tiny model and a local dataset."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_finetune import write_tiny_model

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
COMMAND = "hf-swiglu run -m trl.scripts.sft --model_name_or_path MODEL --dataset_name DATASET --output_dir out"
OPTIONS = "--max_steps 2 --per_device_train_batch_size 2 --report_to none --use_cpu --bf16 false"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_trls_own_command(tmp_path):
    assert COMMAND in PAGE.read_text(encoding="utf-8")
    model, data = write_tiny_model(tmp_path / "model"), tmp_path / "data"
    data.mkdir()
    rows = [{"prompt": f"What is {number}?", "completion": f" A number, {number}."} for number in range(16)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = COMMAND.replace("MODEL", str(model)).replace("DATASET", str(data)).split()[1:]
    command = [sys.executable, "-m", "hf_swiglu", *arguments, *OPTIONS.split()]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "hf-swiglu: 2 MLPs fused in 1 model" in done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
