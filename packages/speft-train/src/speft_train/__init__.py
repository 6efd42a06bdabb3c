"""Sparse fine-tuning runs of language models: Transformers and DeepSpeed, from one YAML file to an evaluated adapter."""
