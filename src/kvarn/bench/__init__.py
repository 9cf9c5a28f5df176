"""The bench: what each recipe costs in quality, memory and time, measured the same way. Nothing imports it."""
