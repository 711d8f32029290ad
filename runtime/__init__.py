"""The live side: plans applied to running models."""
