"""The LLaMA model as mathematics: layers, loss, initial weights and their counts. No ranks, no files."""
