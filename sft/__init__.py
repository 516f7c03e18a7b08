"""The trainer: one plan and one data set -> TRL + PEFT + DeepSpeed."""
