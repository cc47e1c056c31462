"""From one model format to another: a plan carried out, gone on with after a kill, and proven."""
