"""TRL's SFTTrainer with a fused model: `patch_model` before it, and nothing else changes. Needs `pip install trl`.

python examples/sft.py                         # SmolLM2-135M-Instruct on a few questions and answers
python examples/sft.py --lora 8                # LoRA adapters only; SFTTrainer adds them
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from finetune import SMOLLM2
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hf_swiglu import patch_model

QUESTIONS = {
    "What does a gate do in a gated MLP?": "It scales each feature of the up projection before the down projection.",
    "What is swish?": "swish(x) = x * sigmoid(x). PyTorch calls it SiLU.",
    "What is SwiGLU?": "swish(gate) * up, after Shazeer (2020): what LLaMA computes with hidden_act silu.",
    "Why recompute the product in backward?": "Because gate and up are kept anyway, and computing it again is cheap.",
}


def train(model, tokenizer, out: Path, steps: int, lora: int = 0) -> SFTTrainer:
    conversations = [
        {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}
        for question, answer in QUESTIONS.items()
    ]
    arguments = SFTConfig(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=torch.cuda.is_available(),
    )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(conversations),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear") if lora else None,
    )
    trainer.train()
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=SMOLLM2, help="a model whose tokenizer has a chat template")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lora", type=int, default=0, metavar="RANK")
    parser.add_argument("--out", type=Path, default=Path("tuned"))
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    print(patch_model(model))
    train(model, tokenizer, options.out, options.steps, options.lora).save_model()


if __name__ == "__main__":
    main()
