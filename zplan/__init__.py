"""zplan: plan, prove and tune the memory of a DeepSpeed fine-tuning run before it starts."""

__version__ = "0.1.0"
