"""Lists every gated MLP of the installed transformers, with the result of `patch_model`: docs/model-support.md.

`python -m tools.model_support` prints the page.
"""
