"""Lists every gated MLP of the installed transformers, and what `patch_model` does with it: docs/model-support.md.

activation_names.py, dataflow.py,
source_scan.py                       the gated products in the source text of the modeling files
small_configs.py, instances.py       every model type, built small on the meta device
not_mlp_gates.py                     products that are not the gate of an MLP
comparison.py                        a small instance of a class, before and after fusion, against float64
classification.py                    the status of each class
page.py                              the result and its Markdown page

`python -m tools.model_support` prints the page.
"""
