"""The model cut into ranks: process groups, stages and the engine. The only room that knows DeepSpeed and ranks."""
