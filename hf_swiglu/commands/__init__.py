"""What the command line runs: each command is a public function first.

cli.py           the typer app: reads arguments and prints
console.py       running an app so that every failure is one line and an exit code
demo.py          a real model before and after `patch_model`
doctor.py        versions, and the kernel for each device and dtype
inspection.py    what `patch_model` would do, from a config alone
run_script.py    a user's script with every model fused
models.py        from a Hub id, folder or GGUF file to a model
phases.py        prefill, decode and training step of a whole model
timing.py        time: contenders in alternating rounds, and the ratio of two
memory.py        the peak memory of one call
"""
