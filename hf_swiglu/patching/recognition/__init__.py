"""From a class's source to its gated products, or to the reason why it has none that can be fused."""
