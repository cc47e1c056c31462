"""The model sharded over ranks: process groups, stages and the engine. Only this package depends on DeepSpeed."""
