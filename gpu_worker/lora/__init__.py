"""A step's LoRA products, and the layers that add them."""
