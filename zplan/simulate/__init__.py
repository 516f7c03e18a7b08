"""The simulated GPU: the installed DeepSpeed engine and trainer code on fake tensors and a fake process group."""
