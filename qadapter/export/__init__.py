"""A policy outside this project: as one ordinary checkpoint, as a LoRA folder, as a GGUF file, with a model card."""
