"""DeepSpeed's engines behind one small interface: one stage with any ZeRO, our pipeline, DeepSpeed's own pipeline."""
