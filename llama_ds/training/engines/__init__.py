"""Engines behind one small interface: a single stage with ZeRO 0 to 3, our pipeline, DeepSpeed's own pipeline."""
