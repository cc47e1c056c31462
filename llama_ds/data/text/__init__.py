"""Files to texts to ids."""
