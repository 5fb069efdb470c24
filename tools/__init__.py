"""Programs for the development of hf_swiglu; not installed."""
