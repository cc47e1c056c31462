"""The self-test of a layout: before the first start, a tiny model trains under it and must equal plain torch."""
