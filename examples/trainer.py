"""transformers.Trainer with a fused model: `patch_model` before it, and nothing else changes.

python examples/trainer.py                     # SmolLM2-135M on Shakespeare, all weights
python examples/trainer.py --lora 8            # LoRA adapters only
"""

import argparse
from pathlib import Path

import torch
from finetune import SMOLLM2, add_lora, pack, read_text
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_swiglu import patch_model


def train(model, blocks: torch.Tensor, out: Path, steps: int) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": block, "labels": block} for block in blocks])
    trainer.train()
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=SMOLLM2, help="Hub id or folder")
    parser.add_argument("--text", nargs="+", type=Path, help="default: Shakespeare")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lora", type=int, default=0, metavar="RANK")
    parser.add_argument("--out", type=Path, default=Path("trained"))
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    if options.lora:
        model = add_lora(model, options.lora)
    print(patch_model(model))
    trainer = train(model, pack(read_text(options.text)[:1], tokenizer, 128), options.out, options.steps)
    trainer.save_model()


if __name__ == "__main__":
    main()
